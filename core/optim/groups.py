"""The parameter groups of an optimizer: each has its learning rate and weight decay."""

from typing import NamedTuple

from triptych.core.config.spec import AdamWSpec, OptimSpec
from triptych.core.contracts import Hyper
from triptych.core.parameters import GENERATORS


class Group(NamedTuple):
    """The properties of a parameter group.

    Attributes:
        own_rate: whether the group has the constant learning rate of MOCA's weight generators.
        decayed: whether the group has weight decay.
    """

    own_rate: bool
    decayed: bool


def group(name: str, ndim: int, spec: OptimSpec) -> Group:
    """The group of one tensor.

    Args:
        name: canonical name.
        ndim: number of dimensions of the tensor.
        spec: section ``optim``.
    """
    if not isinstance(spec, AdamWSpec):
        return Group(own_rate=False, decayed=True)
    matrix = ndim > 1 and not name.endswith(".bias")
    return Group(
        own_rate=spec.generator_lr is not None and name.startswith(GENERATORS),
        decayed=matrix or spec.decay_on == "all",
    )


def own_rates(spec: OptimSpec) -> tuple[float, float] | None:
    """The constant (learning rate, weight decay) of MOCA's weight generators.

    None if the weight generators follow the schedules of the other tensors.
    """
    if isinstance(spec, AdamWSpec) and spec.generator_lr is not None:
        return spec.generator_lr, spec.weight_decay
    return None


def rates(group: Group, spec: OptimSpec, hyper: Hyper) -> tuple[float, float]:
    """The (learning rate, weight decay) of a group at one step."""
    constant = own_rates(spec) if group.own_rate else None
    lr, decay = constant or (hyper.lr, hyper.weight_decay)
    return lr, decay if group.decayed else 0.0
