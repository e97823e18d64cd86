"""The entries around a state dict in the checkpoints of PyTorch programs."""

from triptych.core.files.tree import Node, Stored
from triptych.core.formats.format import WRAPPER, Output
from triptych.core.formats.moments import Moments
from triptych.core.formats.optimizers import optimizer_state

SCALER = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}
"""The state of PyTorch's loss scaler before its first step: a scale begins anew in these files."""


def checkpoint(output: Output, moments: Moments) -> dict[str, Node]:
    """The entries of a checkpoint of MoCo v1 to v3, without the scaler.

    The programs begin with the entry "epoch" and ignore the name "arch".
    """
    tree: dict[str, Node] = {
        "epoch": output.epoch,
        "arch": output.spec.model.name,
        "state_dict": wrapped(output.tensors),
    }
    if output.optimizer:
        tree["optimizer"] = optimizer_state(moments, output)
    return tree


def wrapped(tensors: dict[str, Stored]) -> dict[str, Node]:
    """A state dict as a data-parallel wrapper names it."""
    return {WRAPPER + name: tensor for name, tensor in tensors.items()}
