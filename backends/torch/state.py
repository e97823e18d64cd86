"""Native tensors <-> canonical arrays. Names, layouts and statistics are canonical already."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from triptych.core.contracts import Array, Slot


def slots(named: Mapping[str, Tensor]) -> dict[str, Slot]:
    """Of tensors by their canonical names."""
    return {name: tensor_slot(tensor) for name, tensor in named.items()}


def tensor_slot(tensor: Tensor) -> Slot:
    """A tensor whose canonical array has its own shape."""
    return Slot(tuple(tensor.shape), partial(to_array, tensor), partial(from_array, tensor))


def to_array(tensor: Tensor) -> Array:
    """A copy, on the host; bfloat16, which NumPy lacks, as float32."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.cpu().numpy().copy()


@torch.no_grad()
def from_array(tensor: Tensor, array: Array) -> None:
    """Sets a live tensor in place, in its own precision."""
    tensor.copy_(torch.from_numpy(np.ascontiguousarray(array)).reshape(tensor.shape))
