"""Copies between host and CUDA device that the computation does not wait for."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import oneflow as flow
from oneflow import Tensor

from triptych.backends.oneflow.state import NUMPY
from triptych.core.contracts import Array


class Courier:
    """Implements ``core.contracts.Courier``.

    OneFlow queues all work, copies in either direction on streams of their own. It keeps tensors
    alive as long as queued work needs them. The host waits where it reads a value.
    """

    def __init__(self, device: str, dtype: flow.dtype) -> None:
        self._device, self._dtype = device, dtype

    def carry(self, arrays: Sequence[Array]) -> list[Tensor]:
        """See ``core.contracts.Courier``."""
        return [flow.from_numpy(self._exact(array)).to(self._device) for array in arrays]

    def bring(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """See ``core.contracts.Courier``."""
        queued = {name: tensor.detach().to("cpu") for name, tensor in tensors.items()}
        return lambda: queued

    def _exact(self, array: Array) -> Array:
        """A copy, which OneFlow may read later; a floating one in the run's precision."""
        floating = np.issubdtype(array.dtype, np.floating)
        return np.array(array, NUMPY[self._dtype] if floating else None, order="C")
