"""The names of the official MoCo v3 release (facebookresearch/moco-v3).

Both encoders have the names of timm or torchvision, as the canonical ones do. The projector has
the name of the classifier: ``head`` in a ViT, ``fc`` in a ResNet. Values and layouts are equal to
ours, so only prefixes change.
"""

from collections.abc import Collection

from triptych.core.config.spec import MocoV3Spec, RunSpec, VitSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.formats.encoders import Encoders
from triptych.core.formats.wrapper import WRAPPER, unwrapped
from triptych.core.parameters import table

BRANCHES = {"student": "base_encoder", "teacher": "momentum_encoder"}
"""Maps canonical to official prefixes."""
ENCODERS = Encoders(
    {branch: f"{official}." for branch, official in BRANCHES.items()},
    heads=("head.", "fc."),
    others=("predictor.",),
)


def matches(names: Collection[str]) -> bool:
    """Whether the names of a file are official ones."""
    prefixes = (*(f"{branch}." for branch in BRANCHES.values()), "predictor.")
    return any(name.removeprefix(WRAPPER).startswith(prefixes) for name in names)


def names(spec: RunSpec) -> dict[str, str]:
    """The official name of each tensor of student and teacher, by canonical name.

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
    """Renames arrays with official names. The others keep theirs, and are reported as unused."""
    canonical = {official: name for name, official in names(spec).items()}
    return {canonical.get(name, name): array for name, array in unwrapped(arrays).items()}


def from_canonical(state: State, spec: RunSpec) -> State:
    """The official state dict, without wrapper prefix and without the optimizer's entries.

    Raises:
        KeyError: the state lacks a tensor of the model.
    """
    return {official: state[name] for name, official in names(spec).items()}
