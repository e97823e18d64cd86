"""What mypy must know of OneFlow, whose wheel has no types; the rest is Any.

Without it a module class would inherit from Any, and a decorated function would be Any: neither
could be held to ``core.contracts``.
"""

from contextlib import ContextDecorator
from types import TracebackType
from typing import Any, TypeAlias

from oneflow import cuda as cuda
from oneflow import nn as nn

Tensor: TypeAlias = Any

class no_grad(ContextDecorator):
    def __enter__(self) -> None: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

def __getattr__(name: str) -> Any: ...
