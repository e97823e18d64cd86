"""Which learning rate and weight decay a tensor gets: the groups of an optimizer."""

from typing import NamedTuple

from triptych.core.config.spec import AdamWSpec, OptimSpec
from triptych.core.contracts import Hyper
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


def own_rates(spec: OptimSpec) -> tuple[float, float] | None:
    """(learning rate, weight decay) of MOCA's weight generators, which move with no schedule.

    None where they follow the schedules like the rest.
    """
    if isinstance(spec, AdamWSpec) and spec.generator_lr is not None:
        return spec.generator_lr, spec.weight_decay
    return None


def rates(group: Group, spec: OptimSpec, hyper: Hyper) -> tuple[float, float]:
    """(learning rate, weight decay) of a group at one step."""
    own = own_rates(spec) if group.own_rate else None
    lr, decay = own or (hyper.lr, hyper.weight_decay)
    return lr, decay if group.decayed else 0.0
