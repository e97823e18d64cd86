"""VISSL (facebookresearch/vissl): MoCo checkpoints. They are read only.

The student lies deep in the file: its encoder is the ``trunk``, and each layer of its projector is
one of the ``heads``. The teacher, the queue and its pointer belong to the ``loss``.
"""

from collections.abc import Iterator

from triptych.core.files.tree import Content, Node
from triptych.core.formats.arithmetic import Resnet
from triptych.core.formats.changes import VECTOR
from triptych.core.formats.format import Format, Layout, Place, tensors_of
from triptych.core.formats.networks import resnet
from triptych.core.formats.rules import Rule, Table, under

MODEL = ("classy_state_dict", "base_model", "model")
"""Keys on the way to the student."""
BRANCHES = {"student": "", "teacher": "loss.moco_encoder."}
"""Prefixes of the names, by canonical branch."""


def _table() -> Table:
    rules = [
        Rule("loss.queue", "memory.queue"),
        Rule("loss.queue_ptr", "memory.pointer", VECTOR),
    ]
    for branch, prefix in BRANCHES.items():
        rules += under(f"{prefix}trunk._feature_blocks.", f"{branch}.encoder.", resnet())
        # Between the two heads of MoCo v2 is a ReLU, which our numbers count.
        rules += [
            Rule(f"{prefix}heads.{head}.clf.0.{{leaf}}", f"{branch}.projector.{2 * head}.{{leaf}}")
            for head in range(2)
        ]
    return Table(*rules)


def _places(content: Content) -> Iterator[Place]:
    """One state dict of all parts. The key of a part is a prefix of its names."""
    model = content.tree
    for key in MODEL:
        model = model.get(key) if isinstance(model, dict) else None
    if not isinstance(model, dict):
        return
    parts: dict[str, Node] = {"trunk": model.get("trunk"), "heads": model.get("heads"),
                              "loss": content.tree.get("loss")}  # fmt: skip
    tensors = {f"{key}.{n}": t for key, part in parts.items() for n, t in tensors_of(part).items()}
    if tensors:
        yield Place("|".join(MODEL), tensors)


FORMAT = Format(
    name="vissl",
    about="VISSL (facebookresearch/vissl)",
    layouts=(
        Layout(
            "MoCo pretraining",
            "pretraining",
            _table(),
            ("trunk._feature_blocks.{rest}",),
            ("moco_v1", "moco_v2"),
            "resnet",
        ),
    ),
    keys=frozenset({"classy_state_dict", "loss", "iteration", "phase_idx"}),
    places=_places,
    arithmetic=(Resnet({b: f"{prefix}trunk._feature_blocks." for b, prefix in BRANCHES.items()}),),
)
