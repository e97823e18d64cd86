"""The names of a single network as timm and torchvision have them, without a prefix.

Such files come from the linear probes of MoCo v1 to v3, from timm, torchvision and DeiT, and from
tools that extract one encoder. The classifier is ``head`` in a ViT and ``fc`` in a ResNet. Values
and layouts are equal to ours.
"""

from collections.abc import Collection

from triptych.core.config.spec import RunSpec, SupervisedSpec, VitSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.formats.encoders import Encoders
from triptych.core.formats.wrapper import WRAPPER, unwrapped
from triptych.core.parameters import table

ENCODERS = Encoders({"single network": ""})
FIRST = ("cls_token", "patch_embed.proj.weight", "patch_embed.proj.0.weight", "conv1.weight")
"""Names of the first layers, by which the format is known."""


def matches(names: Collection[str]) -> bool:
    """Whether the names of a file are those of a single network."""
    return any(name.removeprefix(WRAPPER) in FIRST for name in names)


def names(spec: RunSpec) -> dict[str, str]:
    """The plain name of each tensor of the student, by canonical name.

    Raises:
        UserError: the method has no classifier.
    """
    method = spec.method
    if not isinstance(method, SupervisedSpec):
        raise UserError(
            f"method.name: {method.name}: names without a prefix are those of a single network; "
            "need linear or finetune (for an encoder alone, init.weights)"
        )
    head = "head." if isinstance(spec.model, VitSpec) else "fc."
    prefixes = {"student.encoder.": "", "student.classifier.": head}
    renamed = {}
    for param in table(spec):
        prefix = next((p for p in prefixes if param.name.startswith(p)), None)
        if prefix is not None:
            renamed[param.name] = prefixes[prefix] + param.name.removeprefix(prefix)
    return renamed


def to_canonical(arrays: State, spec: RunSpec) -> State:
    """Renames arrays with plain names. The average of the weights gets the same arrays.

    The others keep their names, and are reported as unused.
    """
    canonical = {plain: name for name, plain in names(spec).items()}
    state = {canonical.get(name, name): array for name, array in unwrapped(arrays).items()}
    for param in table(spec):
        source = param.name.replace("teacher.", "student.", 1)
        if param.name not in state and source in state:
            state[param.name] = state[source]
    return state


def from_canonical(state: State, spec: RunSpec) -> State:
    """The student's state dict, without wrapper prefix.

    Raises:
        KeyError: the state lacks a tensor of the model.
    """
    return {plain: state[name] for name, plain in names(spec).items()}
