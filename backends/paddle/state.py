"""Native tensors <-> canonical arrays: weights of linear layers are (in, out) in Paddle."""

from functools import partial

import numpy as np
import paddle
from paddle import Tensor, nn

from triptych.backends.paddle.layers import linear_weights
from triptych.core.contracts import Array, Slot


def slots(model: nn.Layer, optimizer: object) -> dict[str, Slot]:
    """Every tensor of the run by canonical name."""
    weights = linear_weights(model)
    moments = {
        name: tensor_slot(tensor, name.split(".", 2)[2] in weights)
        for name, tensor in optimizer.moments().items()
    }
    return {**model_slots(model), **moments, "optimizer.step": counter_slot(optimizer, "count")}


def model_slots(model: nn.Layer) -> dict[str, Slot]:
    """Every tensor of student, teacher and memory by canonical name."""
    weights = linear_weights(model)
    found = {n: tensor_slot(tensor, n in weights) for n, tensor in model.state_dict().items()}
    for name in model.memory.counters if hasattr(model, "memory") else ():
        found[f"memory.{name}"] = counter_slot(model.memory, name)
    return found


def tensor_slot(tensor: Tensor, transposed: bool) -> Slot:
    """A tensor whose canonical array has its own shape, or that of its transpose."""
    shape = tuple(tensor.shape)
    return Slot(
        shape[::-1] if transposed else shape,
        partial(to_array, tensor, transposed),
        partial(from_array, tensor, transposed),
    )


def counter_slot(owner: object, attribute: str) -> Slot:
    """A number that the host keeps, as an int64 scalar."""
    return Slot(
        (),
        lambda: np.array(getattr(owner, attribute), np.int64),
        lambda array: setattr(owner, attribute, int(array)),
    )


def to_array(tensor: Tensor, transposed: bool = False) -> Array:
    """A copy, on the host."""
    array = tensor.detach().numpy()
    return np.array(array.T if transposed else array, order="C")


@paddle.no_grad()
def from_array(tensor: Tensor, transposed: bool, array: Array) -> None:
    """Sets a live tensor in place, in its own precision."""
    tensor.set_value(np.array(array.T if transposed else array, NUMPY[tensor.dtype], order="C"))


NUMPY = {paddle.float32: np.float32, paddle.float64: np.float64, paddle.int64: np.int64}
