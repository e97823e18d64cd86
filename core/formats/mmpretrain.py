"""mmpretrain (open-mmlab/mmpretrain), and mmselfsup before it.

The student is ``backbone`` and ``neck``. The teacher is one module, ``encoder_k`` (MoCo v2) or
``momentum_encoder`` (MoCo v3), with backbone 0 and neck 1, and counts its updates in ``steps``. A
ViT has names of its own; its last norm is ``ln1``, as is the first norm of each block. The layers
of the heads of MoCo v3 are numbered by kind: ``fc0``, ``bn0``, ``fc1``, ... The files are those of
``mmengine``.
"""

from collections.abc import Sequence
from typing import Literal

from triptych.core.formats import mmengine
from triptych.core.formats.arithmetic import Resnet, Vit
from triptych.core.formats.changes import VECTOR
from triptych.core.formats.format import Format, Layout
from triptych.core.formats.mmengine import STEPS
from triptych.core.formats.networks import resnet
from triptych.core.formats.rules import Rule, Table, under
from triptych.core.formats.single import SUPERVISED

LAYERS = 8
"""Linear layers of a head for which there are names."""
ORDER = ("queue", "backbone.", "neck.", "head.", "encoder_k.", "momentum_encoder.")
"""The order of the modules in the model."""


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
    return Layout(about, "pretraining", Table(*rules), marks, (method,), "resnet", STEPS, ORDER)


def _moco_v3(encoder: Literal["vit", "resnet"], rules: Sequence[Rule]) -> Layout:
    moved = [*_pair("momentum_encoder", rules, _normed()),
             *under("head.predictor.", "student.predictor.", _normed())]  # fmt: skip
    marks = ("momentum_encoder.{rest}", "head.predictor.{rest}")
    about = "MoCo v3 pretraining"
    return Layout(about, "pretraining", Table(*moved), marks, ("moco_v3",), encoder, STEPS, ORDER)


def _single(encoder: Literal["vit", "resnet"], head: str, rules: Sequence[Rule]) -> list[Layout]:
    """A classifier and an encoder alone."""
    classifier = Rule(f"head.{head}.{{leaf}}", "student.classifier.{leaf}")
    names = Table(*under("backbone.", "student.encoder.", rules), classifier)
    about = "a ViT" if encoder == "vit" else "a ResNet"
    first = "cls_token" if encoder == "vit" else "conv1.weight"
    marks = (f"head.{head}.weight",)
    return [
        Layout(f"{about} with a linear classifier", "linear probe", names, marks, SUPERVISED,
               encoder, ("steps",)),
        Layout(f"{about} encoder", "encoder", names, (f"backbone.{first}",), (), encoder,
               ("steps",)),
    ]  # fmt: skip


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
        _single("vit", "fc", _vit())[0],
        *_single("resnet", "fc", resnet()),
    ),
    keys=frozenset({"meta", "state_dict", "message_hub", "optimizer", "param_schedulers"}),
    places=mmengine.places,
    facts=mmengine.facts,
    constants={"model.layer_norm_eps": 1e-6, "method.teacher_statistics": "copied"},
    arithmetic=(
        Vit({"student": "backbone.", "teacher": "momentum_encoder.module.0."}, NAMES),
        Resnet({"student": "backbone.", "teacher": "momentum_encoder.module.0."}),
        Resnet({"student": "backbone.", "teacher": "encoder_k.module.0."}),
    ),
    epochs=mmengine.finished,
    fault=mmengine.fault,
    moments=mmengine.MOMENTS,
    output=mmengine.output,
)
