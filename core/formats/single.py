"""Single networks under timm's and torchvision's names, without a prefix.

Such files come from timm, DeiT and torchvision, from the linear probes of MoCo v1 to v3, and from
tools that extract one encoder. The classifier is ``head`` in a ViT and ``fc`` in a ResNet.
"""

from dataclasses import replace

from triptych.core.formats.format import Layout
from triptych.core.formats.networks import resnet, vit
from triptych.core.formats.rules import Rule, Table, under

STUDENT = "student.encoder."
SUPERVISED = ("linear", "finetune")
VIT_TABLE = Table(
    *under("", STUDENT, vit()),
    Rule("head.{leaf}", "student.classifier.{leaf}"),
)
RESNET_TABLE = Table(
    *under("", STUDENT, resnet()),
    Rule("fc.{leaf}", "student.classifier.{leaf}"),
)
VIT_ENCODER = Layout(
    "a ViT encoder", "encoder", VIT_TABLE, ("cls_token", "patch_embed.{rest}"), encoder="vit"
)
RESNET_ENCODER = Layout(
    "a ResNet encoder", "encoder", RESNET_TABLE, ("conv1.weight",), encoder="resnet"
)
VIT_CLASSIFIER = replace(
    VIT_ENCODER, about="a ViT classifier", kind="classifier", marks=("head.weight",),
    methods=SUPERVISED,
)  # fmt: skip
RESNET_CLASSIFIER = replace(
    RESNET_ENCODER, about="a ResNet classifier", kind="classifier", marks=("fc.weight",),
    methods=SUPERVISED,
)  # fmt: skip


def probe(classifier: Layout) -> Layout:
    """The layout of a linear probe, from that of a classifier with the same names."""
    return replace(classifier, about="a linear probe", kind="linear probe")
