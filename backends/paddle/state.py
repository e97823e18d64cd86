"""Converts native tensors to canonical arrays and back. Paddle's linear weights are (in, out)."""

from collections.abc import Collection, Mapping
from functools import partial

import numpy as np
import paddle
from paddle import Tensor

from triptych.core.contracts import Array, Slot


def slots(named: Mapping[str, Tensor], transposed: Collection[str]) -> dict[str, Slot]:
    """The slots of tensors, by canonical name.

    Args:
        named: canonical name -> tensor.
        transposed: names of the weights of linear layers.
    """
    return {name: tensor_slot(tensor, name in transposed) for name, tensor in named.items()}


def tensor_slot(tensor: Tensor, transposed: bool) -> Slot:
    """The slot of a tensor. The canonical array has its shape, or the shape of its transpose."""
    shape = tuple(tensor.shape)
    return Slot(
        shape[::-1] if transposed else shape,
        partial(to_array, tensor, transposed),
        partial(from_array, tensor, transposed),
    )


def to_array(tensor: Tensor, transposed: bool = False) -> Array:
    """A copy on the host."""
    array = tensor.detach().numpy()
    return np.array(array.T if transposed else array, order="C")


@paddle.no_grad()
def from_array(tensor: Tensor, transposed: bool, array: Array) -> None:
    """Writes an array into a tensor in place, in the precision of the tensor."""
    tensor.set_value(np.array(array.T if transposed else array, NUMPY[tensor.dtype], order="C"))


NUMPY = {paddle.float32: np.float32, paddle.float64: np.float64, paddle.int64: np.int64}
