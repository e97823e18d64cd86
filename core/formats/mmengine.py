"""What surrounds the state dict in mmengine's files.

With an EMA hook, ``state_dict`` holds the averaged weights and ``ema_state_dict`` the plain ones.
The name of a published file ends in the first eight hexadecimal digits of the file's SHA-256.

The optimizer numbers all parameters, the teacher's too. With options by parameter, as for LARS,
each parameter has its own group, and a frozen one has none. The momentum of LARS holds the learning
rate. An update of the teacher copies the statistics of the student's batch norms.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from triptych.core.config.spec import RunSpec
from triptych.core.files.tree import Content, Node, Stored
from triptych.core.files.zips import mapped
from triptych.core.formats import format as formats
from triptych.core.formats.changes import Facts
from triptych.core.formats.format import Output, Place, tensors_of
from triptych.core.formats.moments import KINDS, STEP, Moments, Parameter, torch_options
from triptych.core.formats.optimizers import optimizer_state
from triptych.core.parameters import table

STEPS = ("encoder_k.steps", "momentum_encoder.steps")
"""Number of updates of the teacher. mmengine copies the student's weights while it is 0."""
AVERAGED, TRAINED = "state_dict", "ema_state_dict"


def places(content: Content) -> Iterator[Place]:
    """The state dicts. A file with an EMA hook has two."""
    tree = content.tree if isinstance(content.tree, dict) else {}
    trained = tensors_of(tree.get(TRAINED))
    if not trained:
        yield from formats.places(content)
        return
    yield Place(AVERAGED, tensors_of(tree.get(AVERAGED)), average=True)
    yield Place(TRAINED, {name.removeprefix("module."): t for name, t in trained.items()})


ARCHES = {
    "mocov3-small": (384, 12, 12),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "deit-tiny": (192, 12, 3),
    "deit-small": (384, 12, 6),
    "deit-base": (768, 12, 12),
}
"""Width, depth and heads of a ViT that a configuration names."""


def facts(content: Content) -> Facts:
    """The number of heads, where the stored configuration states it."""
    tree = content.tree if isinstance(content.tree, dict) else {}
    names = tensors_of(tree.get(AVERAGED))
    heads = _heads(_configuration(tree), names)
    return {} if heads is None else {"model.heads": heads}


def _configuration(tree: Node) -> str:
    """The text of the configuration that the file was trained with."""
    meta = tree.get("meta")
    text = meta.get("cfg") if isinstance(meta, dict) else None
    return text if isinstance(text, str) else ""


def _heads(text: str, tensors: dict[str, Stored]) -> int | None:
    """The number of heads, if all that the text says is one number and fits the tensors."""
    stated = {int(number) for number in re.findall(r"\bnum_heads['\"]?\s*[=:]\s*(\d{1,4})", text)}
    token = tensors.get("backbone.cls_token")
    width = token.shape[-1] if token is not None and token.shape else 0
    depth = len({name.split(".")[2] for name in tensors if name.startswith("backbone.layers.")})
    for name in re.findall(r"\barch['\"]?\s*[=:]\s*['\"]([\w-]{1,40})['\"]", text):
        if name in ARCHES and ARCHES[name][:2] == (width, depth):
            stated.add(ARCHES[name][2])
    return stated.pop() if len(stated) == 1 else None


def finished(content: Content) -> int | None:
    """The number of whole epochs, which stands in the meta data."""
    meta = content.tree.get("meta") if isinstance(content.tree, dict) else None
    found = meta.get("epoch") if isinstance(meta, dict) else None
    return found if isinstance(found, int) and found >= 0 else None


def fault(content: Content) -> str:
    """What is wrong with a published file: its content has another hash than its name says."""
    named = re.search(r"_\d{8}-([0-9a-f]{8})\.pth$", content.path.name)
    if named is None or not content.path.is_file():
        return ""
    found = hashlib.sha256(mapped(content.path)).hexdigest()[:8]
    if found == named[1]:
        return ""
    return (
        f"its name says that its SHA-256 begins with {named[1]}, but it begins with {found}: fetch "
        "the file again, or rename it if it was changed on purpose"
    )


MOMENTS = Moments(
    {"adamw": KINDS["adamw"], "sgd": KINDS["sgd"], "lars": KINDS["lars"]},
    frozen=(
        "encoder_k.{rest}",
        "momentum_encoder.{rest}",
        "backbone.pos_embed",
        "backbone.patch_embed.{rest}",
    ),
    form="mmpretrain",
)


def _optimizer(made: Output) -> Node:
    """The state of the optimizer. LARS has a group for each trained parameter."""
    if made.spec.optim.name != "lars":
        return optimizer_state(MOMENTS, made)
    trained = {param.name for param in table(made.spec) if param.trainable}
    groups: list[list[Parameter]] = []

    def each(params: Sequence[Parameter]) -> list[list[Parameter]]:
        groups.extend([param] for param in params if param.ours in trained)
        return groups

    def options(spec: RunSpec, group: int) -> dict[str, Node]:
        found = torch_options(spec, group)
        found |= {"eta": found.pop("trust_coefficient"), "dampening": 0, "nesterov": False}
        decayed = group >= len(groups) or len(groups[group][0].shape) > 1
        return found if decayed else {**found, "weight_decay": 0.0, "lars_exclude": True}

    return optimizer_state(replace(MOMENTS, groups=each, options=options), made)


def output(made: Output) -> tuple[str, Node]:
    """A file of mmengine's ``Runner``, which resumes from it."""
    tensors = dict(made.tensors)
    count = made.step or int(made.optimizer[STEP].array() if STEP in made.optimizer else 0)
    for name in STEPS:
        teacher = f"{name.removesuffix('steps')}module."
        if any(key.startswith(teacher) for key in tensors):
            tensors.setdefault(name, Stored.of(np.array(max(count, 1), np.int64)))
    empty: Node = {}
    tree: dict[str, Node] = {
        "meta": {"epoch": made.epoch, "iter": count},
        "state_dict": tensors,
        "message_hub": {"log_scalars": empty, "runtime_info": empty, "resumed_keys": empty},
    }
    if made.optimizer:
        tree["optimizer"] = _optimizer(made)
    return "torch", tree
