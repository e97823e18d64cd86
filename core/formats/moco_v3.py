"""The official MoCo v3 release (facebookresearch/moco-v3).

Both encoders have the names of timm or torchvision, as the canonical ones do. The projector has
the name of the classifier: ``head`` in a ViT, ``fc`` in a ResNet. Values and layouts are equal to
ours, so only prefixes change.
"""

from collections.abc import Sequence
from typing import Literal

from triptych.core.formats.format import Format, Layout
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
    return Layout("MoCo v3 pretraining", "pretraining", Table(*moved), marks, ("moco_v3",), encoder)


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
    constants={"model.layer_norm_eps": 1e-6},
)
