"""The official MoCo v3 release (facebookresearch/moco-v3).

Both encoders have the names of timm or torchvision, as the canonical ones do. The projector has
the name of the classifier: ``head`` in a ViT, ``fc`` in a ResNet. Values and layouts are equal to
ours, so only prefixes change. The optimizer numbers all parameters, also those of the momentum
encoder and frozen ones. LARS calls its momentum ``mu``.
"""

from collections.abc import Sequence
from typing import Literal

from triptych.core.files.tree import Node
from triptych.core.formats.arithmetic import SINGLE, networks
from triptych.core.formats.envelopes import checkpoint, loss_scale, scaler
from triptych.core.formats.format import Format, Layout, Output
from triptych.core.formats.moments import KINDS, Moments
from triptych.core.formats.networks import resnet, vit
from triptych.core.formats.rules import Rule, Table, under
from triptych.core.formats.single import RESNET_CLASSIFIER, VIT_CLASSIFIER, probe

BRANCHES = {"student": "base_encoder", "teacher": "momentum_encoder"}
"""Official prefixes, by canonical one."""


def _layout(encoder: Literal["vit", "resnet"], head: str, rules: Sequence[Rule]) -> Layout:
    moved = [Rule("predictor.{rest}", "student.predictor.{rest}")]
    for branch, official in BRANCHES.items():
        moved += under(f"{official}.", f"{branch}.encoder.", rules)
        moved += [Rule(f"{official}.{head}.{{rest}}", f"{branch}.projector.{{rest}}")]
    marks = (*(f"{official}.{{rest}}" for official in BRANCHES.values()), "predictor.{rest}")
    order = ("base_encoder.", "momentum_encoder.", "predictor.")
    return Layout(
        "MoCo v3 pretraining", "pretraining", Table(*moved), marks, ("moco_v3",), encoder,
        order=order,
    )  # fmt: skip


MOMENTS = Moments({"adamw": KINDS["adamw"], "lars": ("mu",)}, scale=loss_scale)


def output(output: Output) -> tuple[str, Node]:
    """A checkpoint as the program writes it."""
    return "torch", {**checkpoint(output, MOMENTS), "scaler": scaler(output)}


FORMAT = Format(
    name="moco_v3",
    about="MoCo v3 (facebookresearch/moco-v3)",
    layouts=(
        _layout("vit", "head", vit()),
        _layout("resnet", "fc", resnet()),
        probe(VIT_CLASSIFIER),
        probe(RESNET_CLASSIFIER),
    ),
    keys=frozenset({"epoch", "arch", "state_dict", "optimizer", "scaler", "best_acc1"}),
    arithmetic=networks({b: f"{name}." for b, name in BRANCHES.items()}, SINGLE),
    constants={"model.layer_norm_eps": 1e-6},
    moments=MOMENTS,
    output=output,
)
