"""Which learning rate and weight decay a tensor gets: the groups of an optimizer."""

from typing import NamedTuple

from triptych.core.config.spec import AdamWSpec, OptimSpec
from triptych.core.engine import Hyper
from triptych.core.parameters import GENERATORS


class Group(NamedTuple):
    """own_rate: the constant rate of the weight generators. decayed: has weight decay."""

    own_rate: bool
    decayed: bool


def group(name: str, ndim: int, spec: OptimSpec) -> Group:
    """The group of one tensor.

    Args:
        name: canonical.
        ndim: number of its dimensions.
    """
    if not isinstance(spec, AdamWSpec):
        return Group(own_rate=False, decayed=True)
    matrix = ndim > 1 and not name.endswith(".bias")
    return Group(
        own_rate=spec.generator_lr is not None and name.startswith(GENERATORS),
        decayed=matrix or spec.decay_on == "all",
    )


def rates(group: Group, spec: OptimSpec, hyper: Hyper) -> tuple[float, float]:
    """(learning rate, weight decay) of a group at one step."""
    lr, decay = hyper.lr, hyper.weight_decay
    if group.own_rate and isinstance(spec, AdamWSpec) and spec.generator_lr is not None:
        # Neither of the two moves with the schedules.
        lr, decay = spec.generator_lr, spec.weight_decay
    return lr, decay if group.decayed else 0.0
