"""Native tensors <-> canonical arrays. Names, layouts and statistics are canonical already."""

from functools import partial

import numpy as np
import oneflow as flow
from oneflow import Tensor, nn

from triptych.core.engine import Array, Slot


def slots(model: nn.Module, optimizer: object) -> dict[str, Slot]:
    """Every tensor of the run by canonical name."""
    tensors = {**model.state_dict(), **optimizer.moments()}
    found = {name: tensor_slot(tensor) for name, tensor in tensors.items()}
    found["optimizer.step"] = Slot(
        (), lambda: np.array(optimizer.count), lambda a: setattr(optimizer, "count", int(a))
    )
    return found


def tensor_slot(tensor: Tensor) -> Slot:
    """A tensor whose canonical array has its own shape."""
    return Slot(tuple(tensor.shape), partial(to_array, tensor), partial(from_array, tensor))


def to_array(tensor: Tensor) -> Array:
    """A copy, on the host, once the tensor has its value."""
    # OneFlow's own array is the tensor's memory, which the next operation in place changes.
    return tensor.detach().cpu().numpy().copy()


def to_tensor(array: Array, dtype: flow.dtype) -> Tensor:
    """A copy, on the host: OneFlow works on while the caller may already refill the array."""
    return flow.from_numpy(np.array(array, NUMPY[dtype], order="C"))


@flow.no_grad()
def from_array(tensor: Tensor, array: Array) -> None:
    """Sets a live tensor in place, in its own precision."""
    tensor.copy_(to_tensor(array, tensor.dtype).reshape(*tensor.shape))


NUMPY = {flow.float32: np.float32, flow.float64: np.float64, flow.int64: np.int64}
