"""Copies between host and CUDA device that the computation does not wait for."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from triptych.core.contracts import Array

_ALIGNMENT = 256
"""Bytes at whose multiples each array begins, as CUDA's own allocations do."""
_SLOTS = 2
"""While the device computes on one batch, the next one arrives."""


class Courier:
    """Implements ``core.contracts.Courier`` with pinned memory and a stream for the copies.

    All arrays of a batch cross in one copy. The copies back have a stream of their own, so that a
    large batch on its way does not delay a metric.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device, self._dtype = torch.device(device), dtype
        self._there, self._back = (torch.cuda.Stream(device=self._device) for _ in range(2))
        self._slots = [_Slot(self._device) for _ in range(_SLOTS)]

    def carry(self, arrays: Sequence[Array]) -> list[Tensor]:
        """See ``core.contracts.Courier``."""
        arrays = [self._exact(array) for array in arrays]
        computing = torch.cuda.current_stream(self._device)
        self._slots[-1].used.record(computing)  # all work on the newest batch is queued by now
        self._slots.append(slot := self._slots.pop(0))
        ends = np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays])
        slot.arrived.synchronize()
        if slot.reserve(int(ends[-1])):
            slot.used.record(computing)  # the new memory may be of tensors that are still read
        starts = [0, *map(int, ends[:-1])]
        for array, start in zip(arrays, starts, strict=True):
            _as(slot.host, start, array)[...] = torch.from_numpy(array)
        with torch.cuda.stream(self._there):
            self._there.wait_event(slot.used)
            slot.device[: int(ends[-1])].copy_(slot.host[: int(ends[-1])], non_blocking=True)
            slot.arrived.record(self._there)
        computing.wait_event(slot.arrived)
        return [_as(slot.device, start, a) for a, start in zip(arrays, starts, strict=True)]

    def bring(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """See ``core.contracts.Courier``."""
        computed, arrived = torch.cuda.Event(), torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self._device))
        kept = {name: tensor.detach() for name, tensor in tensors.items()}
        pinned = self._device.type == "cuda"
        found = {n: torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned) for n, x in kept.items()}
        with torch.cuda.stream(self._back):
            self._back.wait_event(computed)
            for name, tensor in kept.items():
                found[name].copy_(tensor, non_blocking=True)
            arrived.record(self._back)

        def wait() -> dict[str, Tensor]:
            arrived.synchronize()
            kept.clear()  # not earlier: the copies read these tensors
            return found

        return wait

    def _exact(self, array: Array) -> Array:
        """The array in one piece; a floating one in the run's precision."""
        floating = np.issubdtype(array.dtype, np.floating)
        wide = np.float64 if self._dtype == torch.float64 else np.float32
        return np.asarray(array, wide if floating else None, order="C")


class _Slot:
    """Memory for the arrays of one batch, on the host and on the device.

    Attributes:
        arrived: event after the copy to the device. The host may then write the next batch.
        used: event after the computation on the batch. The device may then take the next one.
    """

    def __init__(self, device: torch.device) -> None:
        self._place = device
        self.arrived, self.used = torch.cuda.Event(), torch.cuda.Event()
        self.host = self.device = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> bool:
        """Makes room for ``size`` bytes. Returns whether that took new memory."""
        if self.host.numel() >= size:
            return False
        pinned = self._place.type == "cuda"
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.device = torch.empty(size, dtype=torch.uint8, device=self._place)
        return True


def _as(memory: Tensor, start: int, array: Array) -> Tensor:
    """The part of the memory that holds an array, with its type and shape."""
    kind = torch.from_numpy(array[:0] if array.ndim else array).dtype
    return memory[start : start + array.nbytes].view(kind).view(array.shape)
