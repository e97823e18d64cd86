"""Types of OneFlow for mypy, since OneFlow's wheel has none. A name that is missing here is Any.

Without these types, module classes would inherit from Any, and decorated functions would be Any:
mypy could check neither against ``core.contracts``.
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
