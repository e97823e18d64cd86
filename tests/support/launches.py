"""Counts what PyTorch would launch on a device, where there is none."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "is_nonzero", "equal")
"""Operations whose result the host waits for."""
MAKES_MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Launches(TorchDispatchMode):
    """Counts the operations inside by name, without views, which launch nothing.

    Attributes:
        count: of each operation.
        copies: operations that copy from the host to the device.
        reads: operations that the host waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.copies: list[str] = []
        self.reads: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """See ``TorchDispatchMode``."""
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in READS:
            self.reads.append(name)
        elif _launches(function, name):
            self.count[name] += 1
        if _device(result) == "cuda" and any(_device(x) == "cpu" and x.ndim for x in args):
            self.copies.append(name)
        return result


def _launches(function: Any, name: str) -> bool:
    views = [r.alias_info for r in function._schema.returns]
    is_view = any(info is not None and not info.is_write for info in views)
    return not is_view and name not in (*MAKES_MEMORY, "detach", "lift_fresh")


def _device(x: Any) -> str:
    first = x[0] if isinstance(x, tuple | list) and x else x
    return first.device.type if isinstance(first, torch.Tensor) else ""
