"""Converts native tensors to canonical arrays and back. Names and layouts are the same in both."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from triptych.core.contracts import Array, Slot


def slots(named: Mapping[str, Tensor]) -> dict[str, Slot]:
    """The slots of tensors, by canonical name."""
    return {name: tensor_slot(tensor) for name, tensor in named.items()}


def tensor_slot(tensor: Tensor) -> Slot:
    """The slot of a tensor. The canonical array has the shape of the tensor."""
    return Slot(tuple(tensor.shape), partial(to_array, tensor), partial(from_array, tensor))


def to_array(tensor: Tensor) -> Array:
    """A copy on the host. NumPy lacks bfloat16: it becomes float32."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.cpu().numpy().copy()


@torch.no_grad()
def from_array(tensor: Tensor, array: Array) -> None:
    """Writes an array into a tensor in place, in the precision of the tensor."""
    tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)).reshape(tensor.shape))
