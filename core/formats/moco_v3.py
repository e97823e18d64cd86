"""The names of the official MoCo v3 release (facebookresearch/moco-v3).

Its encoders' tensors are timm's and torchvision's, as ours are, and the projector takes the place
of the classifier: ``head`` in a ViT, ``fc`` in a ResNet. Values and layouts are equal, so only
prefixes change.
"""

from collections.abc import Collection

from triptych.core.config.spec import MocoV3Spec, RunSpec, VitSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.formats.wrapper import WRAPPER, unwrapped
from triptych.core.parameters import table

BRANCHES = {"student": "base_encoder", "teacher": "momentum_encoder"}
"""Canonical -> official."""


def matches(names: Collection[str]) -> bool:
    """Whether the names of a file are official ones."""
    prefixes = (*(f"{branch}." for branch in BRANCHES.values()), "predictor.")
    return any(name.removeprefix(WRAPPER).startswith(prefixes) for name in names)


def names(spec: RunSpec) -> dict[str, str]:
    """Canonical -> official name of each tensor of student and teacher.

    Raises:
        UserError: the method is not MoCo v3.
    """
    if not isinstance(spec.method, MocoV3Spec):
        raise UserError(f"method.name: {spec.method.name}: official MoCo v3 names need moco_v3")
    head = "head" if isinstance(spec.model, VitSpec) else "fc"
    prefixes = {"student.predictor.": "predictor."}
    for branch, official in BRANCHES.items():
        prefixes[f"{branch}.encoder."] = f"{official}."
        prefixes[f"{branch}.projector."] = f"{official}.{head}."
    renamed = {}
    for param in table(spec):
        prefix = next(p for p in prefixes if param.name.startswith(p))
        renamed[param.name] = prefixes[prefix] + param.name.removeprefix(prefix)
    return renamed


def to_canonical(arrays: State, spec: RunSpec) -> State:
    """Renames what has an official name; anything else keeps its own, to be reported as unused."""
    canonical = {official: name for name, official in names(spec).items()}
    return {canonical.get(name, name): array for name, array in unwrapped(arrays).items()}


def from_canonical(state: State, spec: RunSpec) -> State:
    """The official state dict, unwrapped. Optimizer entries have no place in it.

    Raises:
        KeyError: a tensor of the model is not in the state.
    """
    return {official: state[name] for name, official in names(spec).items()}
