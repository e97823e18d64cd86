"""The entries around a state dict in the checkpoints of PyTorch programs."""

from triptych.core.files.tree import Content, Node, Stored
from triptych.core.formats.format import WRAPPER, Output
from triptych.core.formats.moments import Moments
from triptych.core.formats.optimizers import optimizer_state
from triptych.core.optim import scaling

SCALER: dict[str, Node] = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}
"""The state of PyTorch's loss scaler before its first step."""
SCALES = tuple(2**i for i in range(scaling.MOST.bit_length()))
"""The scales that a run here may have."""


def loss_scale(content: Content) -> tuple[dict[str, int], list[str]]:
    """The loss scale of a file, by canonical name, and a note if a run here may not have it.

    A scaler that was not in use has no state: there is neither.
    """
    found = content.tree.get("scaler") if isinstance(content.tree, dict) else None
    if not found:
        return {}, []
    entries = found if isinstance(found, dict) else {}
    scale, good = entries.get("scale"), entries.get("_growth_tracker")
    if isinstance(scale, int | float) and isinstance(good, int) and scale is not True:
        if scale in SCALES and good in range(scaling.INTERVAL):
            return {scaling.SCALE: int(scale), scaling.GOOD_STEPS: good}, []
    return {}, [
        f"scaler: expected a power of 2 up to {scaling.MOST} as scale and less than "
        f"{scaling.INTERVAL} good steps; a run in float16 begins its scale anew"
    ]


def scaler(output: Output) -> dict[str, Node]:
    """The state of PyTorch's loss scaler: with the scale of the run, or before its first step."""
    if scaling.SCALE not in output.optimizer:
        return SCALER
    scale, good = (
        int(output.optimizer[name].array()) for name in (scaling.SCALE, scaling.GOOD_STEPS)
    )
    return {**SCALER, "scale": float(scale), "_growth_tracker": good}


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
