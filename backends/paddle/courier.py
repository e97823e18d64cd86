"""Copies between host and CUDA device that the computation does not wait for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from triptych.core.contracts import Array

_SLOTS = 2
"""While the device computes on one batch, the next one arrives."""


class Courier:
    """Implements ``core.contracts.Courier`` with pinned memory and a stream for the copies.

    Paddle gives the memory of a dropped tensor to the next copy, also while the device still reads
    it. So the tensors of a batch are kept until the computation on it is done.
    """

    def __init__(self, device: str, dtype: paddle.dtype) -> None:
        self._device, self._dtype = device.replace("cuda", "gpu"), dtype
        self._there, self._back = (paddle.device.Stream(self._device) for _ in range(2))
        self._pinned = paddle.CUDAPinnedPlace()
        self._slots: list[tuple[Any, list[Tensor]]] = []
        """Of each of the newest batches: event after the computation on it, and its tensors."""

    def carry(self, arrays: Sequence[Array]) -> list[Tensor]:
        """See ``core.contracts.Courier``."""
        computing = paddle.device.current_stream(self._device)
        if self._slots:
            self._slots[-1][0].record(computing)  # all work on the newest batch is queued by now
        if len(self._slots) == _SLOTS:
            self._slots.pop(0)[0].synchronize()
        pinned = [paddle.to_tensor(self._exact(array), place=self._pinned) for array in arrays]
        with paddle.device.stream_guard(self._there):
            tensors = [tensor.cuda(None, False) for tensor in pinned]
            arrived = paddle.device.Event()
            arrived.record(self._there)
        computing.wait_event(arrived)
        self._slots.append((paddle.device.Event(), [*pinned, *tensors]))
        return tensors

    def bring(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """See ``core.contracts.Courier``."""
        computed, arrived = paddle.device.Event(), paddle.device.Event()
        computed.record(paddle.device.current_stream(self._device))
        kept = {name: tensor.detach() for name, tensor in tensors.items()}
        with paddle.device.stream_guard(self._back):
            self._back.wait_event(computed)
            found = {name: tensor._copy_to(self._pinned, False) for name, tensor in kept.items()}
            arrived.record(self._back)

        def wait() -> dict[str, Tensor]:
            arrived.synchronize()
            kept.clear()  # not earlier: the copies read these tensors
            return found

        return wait

    def _exact(self, array: Array) -> Array:
        """The array in one piece; a floating one in the run's precision."""
        floating = np.issubdtype(array.dtype, np.floating)
        wide = np.float64 if self._dtype == paddle.float64 else np.float32
        return np.asarray(array, wide if floating else None, order="C")
