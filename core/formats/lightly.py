"""lightly (lightly-ai/lightly): checkpoints of its MoCo v2 benchmark. They are read only.

The file has no queue. A classifier is trained beside the method.
"""

from triptych.core.formats.arithmetic import Resnet
from triptych.core.formats.format import Format, Layout
from triptych.core.formats.networks import resnet
from triptych.core.formats.rules import Rule, Table, under

BRANCHES = {"student": "", "teacher": "key_"}
"""Prefixes of the names, by canonical branch."""


def _table() -> Table:
    rules = []
    for branch, prefix in BRANCHES.items():
        rules += under(f"{prefix}backbone.", f"{branch}.encoder.", resnet())
        layers = f"{prefix}projection_head.layers.{{rest}}"
        rules += [Rule(layers, f"{branch}.projector.{{rest}}")]
    return Table(*rules)


FORMAT = Format(
    name="lightly",
    about="lightly (lightly-ai/lightly)",
    layouts=(
        Layout(
            "MoCo v2 pretraining",
            "pretraining",
            _table(),
            ("key_backbone.{rest}",),
            ("moco_v2",),
            "resnet",
            beside=("online_classifier.{rest}",),
        ),
    ),
    keys=frozenset({"state_dict", "pytorch-lightning_version", "optimizer_states"}),
    arithmetic=(Resnet({b: f"{prefix}backbone." for b, prefix in BRANCHES.items()}),),
)
