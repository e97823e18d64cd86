"""solo-learn (vturrisi/solo-learn): checkpoints of Lightning. They are read only.

Both encoders have the names of timm or torchvision. The teacher's modules are ``momentum_*``. The
queue of MoCo v2+ has a part for each of the two views, and our MoCo v2 has one view of keys, so the
queue has no canonical twin. A classifier is trained beside the method.
"""

from collections.abc import Sequence
from typing import Literal

from triptych.core.formats.arithmetic import networks
from triptych.core.formats.format import Format, Layout
from triptych.core.formats.networks import resnet, vit
from triptych.core.formats.rules import Rule, Table, under

BRANCHES = {"student": "", "teacher": "momentum_"}
"""Prefixes of the names, by canonical branch."""
CLASSIFIERS = ("classifier.{leaf}", "momentum_classifier.{leaf}")


def _layout(
    method: str,
    encoder: Literal["vit", "resnet"],
    rules: Sequence[Rule],
    more: Sequence[Rule] = (),
    beside: tuple[str, ...] = (),
) -> Layout:
    moved = [*more]
    for branch, prefix in BRANCHES.items():
        moved += under(f"{prefix}backbone.", f"{branch}.encoder.", rules)
        moved += [Rule(f"{prefix}projector.{{rest}}", f"{branch}.projector.{{rest}}")]
    about = {"moco_v2": "MoCo v2+ pretraining", "moco_v3": "MoCo v3 pretraining"}[method]
    return Layout(
        about,
        "pretraining",
        Table(*moved),
        ("momentum_backbone.{rest}",),
        (method,),
        encoder,
        beside=(*CLASSIFIERS, *beside),
    )


QUEUES = ("queue", "queue_ptr")
PREDICTOR = [Rule("predictor.{rest}", "student.predictor.{rest}")]

FORMAT = Format(
    name="solo",
    about="solo-learn (vturrisi/solo-learn)",
    layouts=(
        _layout("moco_v2", "resnet", resnet(), beside=QUEUES),
        _layout("moco_v2", "vit", vit(), beside=QUEUES),
        _layout("moco_v3", "vit", vit(), PREDICTOR),
        _layout("moco_v3", "resnet", resnet(), PREDICTOR),
    ),
    keys=frozenset({"state_dict", "pytorch-lightning_version", "optimizer_states"}),
    constants={"model.layer_norm_eps": 1e-6},
    arithmetic=networks({b: f"{prefix}backbone." for b, prefix in BRANCHES.items()}),
)
