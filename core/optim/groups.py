"""The parameter groups of an optimizer: each has its learning rate and weight decay."""

from collections.abc import Mapping
from typing import NamedTuple

from triptych.core.config.spec import AdamWSpec, LinearSpec, OptimSpec, Probe, RunSpec, VitSpec
from triptych.core.contracts import Hyper, Tensor
from triptych.core.parameters import GENERATORS

CLASSIFIER = "student.classifier."
ENCODER = "student.encoder."
TOKENS = (f"{ENCODER}cls_token", f"{ENCODER}pos_embed")


class Group(NamedTuple):
    """The properties of a parameter group.

    Attributes:
        scale: factor on the scheduled learning rate.
        constant: whether the group has the constant learning rate of MOCA's weight generators
            instead.
        decay: weight decay of the group; None: the scheduled weight decay.
    """

    scale: float = 1.0
    constant: bool = False
    decay: float | None = None

    @property
    def order(self) -> tuple[bool, bool, float, float]:
        """A key by which groups can be sorted."""
        return self.constant, self.decay != 0.0, self.scale, self.decay or 0.0


def group(name: str, ndim: int, spec: RunSpec) -> Group:
    """The group of one tensor.

    Args:
        name: canonical name.
        ndim: number of dimensions of the tensor.
        spec: of the run.
    """
    optim, probe = spec.optim, _probe(name, spec)
    if not isinstance(optim, AdamWSpec):
        return Group(probe.rate, decay=probe.weight_decay)
    constant = optim.generator_lr is not None and name.startswith(GENERATORS)
    decay = optim.weight_decay if constant else probe.weight_decay
    if not _decayed(name, ndim, optim):
        decay = 0.0
    return Group(probe.rate * layer_scale(name, spec), constant, decay)


def assign(named: Mapping[str, Tensor], spec: RunSpec) -> dict[str, Group]:
    """The groups of several tensors by canonical name. Each tensor has the attribute ``ndim``."""
    return {name: group(name, tensor.ndim, spec) for name, tensor in named.items()}


def layer_scale(name: str, spec: RunSpec) -> float:
    """The factor of layer decay on the learning rate of a tensor (BEiT, arXiv 2106.08254).

    Layer 0 holds class token, positions and patch embedding, layer i the block i - 1. All other
    tensors are in the layer after the last block and have the factor 1.
    """
    decay = spec.optim.layer_decay if isinstance(spec.optim, AdamWSpec) else 1.0
    if decay == 1.0 or not isinstance(spec.model, VitSpec):
        return 1.0
    last = spec.model.depth + 1
    part, *path = name.removeprefix(ENCODER).split(".")
    layers = {"cls_token": 0, "pos_embed": 0, "patch_embed": 0}
    layer = int(path[0]) + 1 if part == "blocks" else layers.get(part, last)
    return float(decay ** (last - layer))


def _probe(name: str, spec: RunSpec) -> Probe:
    """The probe that a tensor belongs to; a neutral one for other methods than the linear probe."""
    if not isinstance(spec.method, LinearSpec):
        return Probe(1.0, None)
    probes = spec.method.probes
    number = name.removeprefix(CLASSIFIER).partition(".")[0]
    return probes[int(number)] if len(probes) > 1 else probes[0]


def _decayed(name: str, ndim: int, spec: AdamWSpec) -> bool:
    """Whether ``decay_on`` selects a tensor."""
    matrix = ndim > 1 and not name.endswith(".bias")
    rules = {"all": True, "matrices": matrix, "weights": matrix and name not in TOKENS}
    return rules[spec.decay_on]


def own_rates(spec: OptimSpec) -> tuple[float, float] | None:
    """The constant (learning rate, weight decay) of MOCA's weight generators.

    None if the weight generators follow the schedules of the other tensors.
    """
    if isinstance(spec, AdamWSpec) and spec.generator_lr is not None:
        return spec.generator_lr, spec.weight_decay
    return None


def rates(group: Group, spec: OptimSpec, hyper: Hyper) -> tuple[float, float]:
    """The (learning rate, weight decay) of a group at one step."""
    constant = own_rates(spec) if group.constant else None
    lr = constant[0] if constant else hyper.lr * group.scale
    return lr, hyper.weight_decay if group.decay is None else group.decay
