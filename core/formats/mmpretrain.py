"""mmpretrain (open-mmlab/mmpretrain), and mmselfsup before it.

The student is ``backbone`` and ``neck``. The teacher is one module, ``encoder_k`` (MoCo v2) or
``momentum_encoder`` (MoCo v3), with backbone 0 and neck 1, and counts its updates in ``steps``. A
ViT has names of its own; its last norm is ``ln1``, as is the first norm of each block. The layers
of the heads of MoCo v3 are numbered by kind: ``fc0``, ``bn0``, ``fc1``, ...

With an EMA hook, ``state_dict`` holds the averaged weights and ``ema_state_dict`` the plain ones.
The name of a published file ends in the first eight hexadecimal digits of the file's SHA-256.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from triptych.core.files.tree import Content, Node, Stored
from triptych.core.files.zips import mapped
from triptych.core.formats.arithmetic import Resnet, Vit
from triptych.core.formats.changes import VECTOR, Facts
from triptych.core.formats.format import Format, Layout, Output, Place, places, tensors_of
from triptych.core.formats.networks import resnet
from triptych.core.formats.rules import Rule, Table, under
from triptych.core.formats.single import SUPERVISED

LAYERS = 8
"""Linear layers of a head for which there are names."""
STEPS = ("encoder_k.steps", "momentum_encoder.steps")
"""Number of updates of the teacher. mmengine copies the student's weights while it is 0."""
AVERAGED, TRAINED = "state_dict", "ema_state_dict"


def _vit() -> list[Rule]:
    block, ours = "layers.{i}.", "blocks.{i}."
    return [
        *(Rule(name, name) for name in ("cls_token", "pos_embed")),
        Rule("patch_embed.projection.{leaf}", "patch_embed.proj.{leaf}"),
        Rule(f"{block}ln1.{{leaf}}", f"{ours}norm1.{{leaf}}"),
        Rule(f"{block}attn.{{rest}}", f"{ours}attn.{{rest}}"),
        Rule(f"{block}ln2.{{leaf}}", f"{ours}norm2.{{leaf}}"),
        Rule(f"{block}ffn.layers.0.0.{{leaf}}", f"{ours}mlp.fc1.{{leaf}}"),
        Rule(f"{block}ffn.layers.1.{{leaf}}", f"{ours}mlp.fc2.{{leaf}}"),
        Rule("ln1.{leaf}", "norm.{leaf}"),
        Rule("ln2.{leaf}", "fc_norm.{leaf}"),
    ]


def _normed() -> list[Rule]:
    """The layers of a head of MoCo v3. Ours are numbered with their ReLU."""
    kinds = (("fc", 0), ("bn", 1))
    return [
        Rule(f"{kind}{n}.{{leaf}}", f"{3 * n + place}.{{leaf}}")
        for n in range(LAYERS)
        for kind, place in kinds
    ]


def _pair(teacher: str, encoder: Sequence[Rule], neck: Sequence[Rule]) -> list[Rule]:
    """Student and teacher."""
    return [
        *under("backbone.", "student.encoder.", encoder),
        *under("neck.", "student.projector.", neck),
        *under(f"{teacher}.module.0.", "teacher.encoder.", encoder),
        *under(f"{teacher}.module.1.", "teacher.projector.", neck),
    ]


def _queue(about: str, method: str, neck: Rule) -> Layout:
    rules = [Rule("queue", "memory.queue"), Rule("queue_ptr", "memory.pointer", VECTOR),
             *_pair("encoder_k", resnet(), [neck])]  # fmt: skip
    marks = ("encoder_k.{rest}",)
    return Layout(about, "pretraining", Table(*rules), marks, (method,), "resnet", STEPS)


def _moco_v3(encoder: Literal["vit", "resnet"], rules: Sequence[Rule]) -> Layout:
    moved = [*_pair("momentum_encoder", rules, _normed()),
             *under("head.predictor.", "student.predictor.", _normed())]  # fmt: skip
    marks = ("momentum_encoder.{rest}", "head.predictor.{rest}")
    about = "MoCo v3 pretraining"
    return Layout(about, "pretraining", Table(*moved), marks, ("moco_v3",), encoder, STEPS)


def _single(encoder: Literal["vit", "resnet"], head: str, rules: Sequence[Rule]) -> list[Layout]:
    """A classifier and an encoder alone."""
    classifier = Rule(f"head.{head}.{{leaf}}", "student.classifier.{leaf}")
    table = Table(*under("backbone.", "student.encoder.", rules), classifier)
    about = "a ViT" if encoder == "vit" else "a ResNet"
    first = "cls_token" if encoder == "vit" else "conv1.weight"
    marks = (f"head.{head}.weight",)
    return [
        Layout(f"{about} with a linear classifier", "linear probe", table, marks, SUPERVISED,
               encoder, ("steps",)),
        Layout(f"{about} encoder", "encoder", table, (f"backbone.{first}",), (), encoder,
               ("steps",)),
    ]  # fmt: skip


def _places(content: Content) -> Iterator[Place]:
    """The state dicts. A file with an EMA hook has two."""
    tree = content.tree if isinstance(content.tree, dict) else {}
    trained = tensors_of(tree.get(TRAINED))
    if not trained:
        yield from places(content)
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


def _facts(content: Content) -> Facts:
    """The number of heads, where the stored configuration states it, and how the teacher learns."""
    tree = content.tree if isinstance(content.tree, dict) else {}
    names = tensors_of(tree.get(AVERAGED))
    facts: dict[str, object] = {}
    if heads := _heads(_configuration(tree), names):
        facts["model.heads"] = heads
    return facts


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


def _fault(content: Content) -> str:
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


def _output(output: Output) -> tuple[str, Node]:
    """A file of mmengine's ``Runner``, which resumes from it."""
    tensors = dict(output.tensors)
    for name in STEPS:
        teacher = f"{name.removesuffix('steps')}module."
        if any(key.startswith(teacher) for key in tensors):
            tensors.setdefault(name, Stored.of(np.array(max(output.step or 1, 1), np.int64)))
    empty: Node = {}
    return "torch", {
        "meta": {"epoch": 0, "iter": output.step or 0},
        "state_dict": tensors,
        "message_hub": {"log_scalars": empty, "runtime_info": empty, "resumed_keys": empty},
    }


NAMES = {
    "patches": "patch_embed.projection",
    "first norm": "layers.{i}.ln1",
    "query, key, value": "layers.{i}.attn.qkv",
    "attention": "layers.{i}.attn.proj",
    "second norm": "layers.{i}.ln2",
    "hidden": "layers.{i}.ffn.layers.0.0",
    "output": "layers.{i}.ffn.layers.1",
    "last norm": "ln1",
    "norm of the mean": "ln2",
}
"""Names of the parts of a ViT in its forward pass."""

FORMAT = Format(
    name="mmpretrain",
    about="mmpretrain (open-mmlab/mmpretrain)",
    layouts=(
        _queue("MoCo v1 pretraining", "moco_v1", Rule("fc.{leaf}", "0.{leaf}")),
        _queue("MoCo v2 pretraining", "moco_v2", Rule("mlp.{rest}", "{rest}")),
        _moco_v3("vit", _vit()),
        _moco_v3("resnet", resnet()),
        *_single("vit", "layers.head", _vit()),
        *_single("resnet", "fc", resnet()),
    ),
    keys=frozenset({"meta", "state_dict", "message_hub", "optimizer", "param_schedulers"}),
    places=_places,
    facts=_facts,
    constants={"model.layer_norm_eps": 1e-6, "method.teacher_statistics": "copied"},
    fault=_fault,
    arithmetic=(
        Vit({"student": "backbone.", "teacher": "momentum_encoder.module.0."}, NAMES),
        Resnet({"student": "backbone.", "teacher": "momentum_encoder.module.0."}),
        Resnet({"student": "backbone.", "teacher": "encoder_k.module.0."}),
    ),
    output=_output,
)
