"""Native tensors <-> canonical arrays. Names, layouts and statistics are canonical already."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import oneflow as flow
from oneflow import Tensor

from triptych.core.contracts import Array, Slot


def slots(named: Mapping[str, Tensor]) -> dict[str, Slot]:
    """Of tensors by their canonical names."""
    return {name: tensor_slot(tensor) for name, tensor in named.items()}


def tensor_slot(tensor: Tensor) -> Slot:
    """A tensor whose canonical array has its own shape."""
    return Slot(tuple(tensor.shape), partial(to_array, tensor), partial(from_array, tensor))


def to_array(tensor: Tensor) -> Array:
    """A copy, on the host, once the tensor has its value."""
    # The array that OneFlow gives is the tensor's memory: the next operation in place changes it.
    return tensor.cpu().numpy().copy()


@flow.no_grad()
def from_array(tensor: Tensor, array: Array) -> None:
    """Sets a live tensor in place, in its own precision."""
    # A copy, since OneFlow reads it later than this returns.
    own = np.array(array, NUMPY[tensor.dtype], order="C").reshape(tuple(tensor.shape))
    tensor.copy_(flow.from_numpy(own))


NUMPY = {flow.float32: np.float32, flow.float64: np.float64, flow.int64: np.int64}
