"""The names of the official MoCo v3 release (facebookresearch/moco-v3).

Its encoders' tensors are timm's, as ours are, and the projector is the encoder's ``head``. Values
and layouts are equal, so only prefixes change.
"""

from collections.abc import Collection

from triptych.core.config.spec import RunSpec
from triptych.core.engine import State
from triptych.core.parameters import table

PREFIXES = {
    "student.encoder.": "base_encoder.",
    "student.projector.": "base_encoder.head.",
    "student.predictor.": "predictor.",
    "teacher.encoder.": "momentum_encoder.",
    "teacher.projector.": "momentum_encoder.head.",
}
"""Canonical -> official."""

WRAPPER = "module."
"""Prefix of all names where the model was saved inside its data-parallel wrapper."""


def matches(names: Collection[str]) -> bool:
    """Whether the names of a file are official ones."""
    prefixes = tuple(PREFIXES.values())
    return any(name.removeprefix(WRAPPER).startswith(prefixes) for name in names)


def names(spec: RunSpec) -> dict[str, str]:
    """Canonical -> official name of each tensor of student and teacher."""
    renamed = {}
    for param in table(spec):
        prefix = next(p for p in PREFIXES if param.name.startswith(p))
        renamed[param.name] = PREFIXES[prefix] + param.name.removeprefix(prefix)
    return renamed


def to_canonical(arrays: State, spec: RunSpec) -> State:
    """Renames what has an official name; anything else keeps its own, to be reported as unused."""
    canonical = {official: name for name, official in names(spec).items()}
    wrapped = all(name.startswith(WRAPPER) for name in arrays)
    plain = {name.removeprefix(WRAPPER if wrapped else ""): a for name, a in arrays.items()}
    return {canonical.get(name, name): array for name, array in plain.items()}


def from_canonical(state: State, spec: RunSpec) -> State:
    """The official state dict, unwrapped. Optimizer entries have no place in it.

    Raises:
        KeyError: a tensor of the model is not in the state.
    """
    return {official: state[name] for name, official in names(spec).items()}
