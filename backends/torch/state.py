"""Native tensors <-> canonical arrays. Names, layouts and statistics are canonical already."""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from triptych.core.contracts import Array, Slot


def slots(model: nn.Module, optimizer: object) -> dict[str, Slot]:
    """Every tensor of the run by canonical name."""
    moments = {name: tensor_slot(tensor) for name, tensor in optimizer.moments().items()}
    return {**model_slots(model), **moments, "optimizer.step": counter_slot(optimizer, "count")}


def model_slots(model: nn.Module) -> dict[str, Slot]:
    """Every tensor of student, teacher and memory by canonical name."""
    found = {n: tensor_slot(t) for n, t in model.state_dict(keep_vars=True).items()}
    for name in model.memory.counters if hasattr(model, "memory") else ():
        found[f"memory.{name}"] = counter_slot(model.memory, name)
    return found


def tensor_slot(tensor: Tensor) -> Slot:
    """A tensor whose canonical array has its own shape."""
    return Slot(tuple(tensor.shape), partial(to_array, tensor), partial(from_array, tensor))


def counter_slot(owner: object, attribute: str) -> Slot:
    """A number that the host keeps, as an int64 scalar."""
    return Slot(
        (),
        lambda: np.array(getattr(owner, attribute), np.int64),
        lambda array: setattr(owner, attribute, int(array)),
    )


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
