"""Converts native tensors to canonical arrays and back. Names and layouts are the same in both."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import oneflow as flow
from oneflow import Tensor

from triptych.core.contracts import Array, Slot


def slots(named: Mapping[str, Tensor]) -> dict[str, Slot]:
    """The slots of tensors, by canonical name."""
    return {name: tensor_slot(tensor) for name, tensor in named.items()}


def tensor_slot(tensor: Tensor) -> Slot:
    """The slot of a tensor. The canonical array has the shape of the tensor."""
    return Slot(tuple(tensor.shape), partial(to_array, tensor), partial(from_array, tensor))


def to_array(tensor: Tensor) -> Array:
    """A copy on the host. The call waits until the tensor is computed."""
    # OneFlow's array shares the tensor's memory: the next operation in place would change it.
    return tensor.cpu().numpy().copy()


@flow.no_grad()
def from_array(tensor: Tensor, array: Array) -> None:
    """Writes an array into a tensor in place, in the precision of the tensor."""
    # A copy, since OneFlow may read the array after this function has returned.
    copy = np.array(array, NUMPY[tensor.dtype], order="C").reshape(tuple(tensor.shape))
    tensor.copy_(flow.from_numpy(copy))


NUMPY = {flow.float32: np.float32, flow.float64: np.float64, flow.int64: np.int64}
