"""Backbones for detectron2 (facebookresearch/detectron2): a pickle of NumPy arrays.

The stages are ``res2`` to ``res5``, and the norm of a convolution is ``norm`` inside it. MoCo's
converter writes such files. It keeps the head of MoCo as ``stem.fc``, which detectron2 ignores, and
the counters of the norms.
"""

from triptych.core.files.tree import Node
from triptych.core.formats.arithmetic import Resnet
from triptych.core.formats.format import Format, Layout, Output
from triptych.core.formats.rules import Rule, Table, under

BLOCKS = [
    rule
    for stage in range(1, 5)
    for rule in under(
        f"res{stage + 1}.{{i}}.",
        f"layer{stage}.{{i}}.",
        [
            Rule("conv{j}.norm.{leaf}", "bn{j}.{leaf}"),
            Rule("conv{j}.weight", "conv{j}.weight"),
            Rule("shortcut.norm.{leaf}", "downsample.1.{leaf}"),
            Rule("shortcut.weight", "downsample.0.weight"),
        ],
    )
]
RESNET = under(
    "",
    "student.encoder.",
    [
        Rule("stem.conv1.norm.{leaf}", "bn1.{leaf}"),
        Rule("stem.conv1.weight", "conv1.weight"),
        *BLOCKS,
    ],
)


def _moco(about: str, method: str, theirs: str, ours: str) -> Layout:
    """A student of MoCo, with a template for the layers of its head."""
    head = Rule(f"stem.fc.{theirs}", f"student.projector.{ours}")
    marks = (f"stem.fc.{theirs}",)
    return Layout(about, "encoder", Table(*RESNET, head), marks, (method,), "resnet")


def _output(output: Output) -> tuple[str, Node]:
    """A file that detectron2 opens by the suffix ``.pkl``, and whose names it matches itself."""
    about = {"__author__": "triptych", "matching_heuristics": True}
    return "pickle", {"model": output.tensors, **about}


FORMAT = Format(
    name="detectron2",
    about="detectron2 (facebookresearch/detectron2)",
    layouts=(
        _moco("a student of MoCo v1", "moco_v1", "{leaf}", "0.{leaf}"),
        _moco("a student of MoCo v2", "moco_v2", "{i}.{leaf}", "{i}.{leaf}"),
        Layout("a ResNet encoder", "encoder", Table(*RESNET), ("stem.conv1.weight",), (), "resnet"),
    ),
    keys=frozenset({"model", "__author__", "matching_heuristics"}),
    arithmetic=(
        Resnet(
            stem=("stem.conv1", "stem.conv1.norm"),
            stages=("res2", "res3", "res4", "res5"),
            norm=".conv{i}.norm",
            shortcut=(".shortcut", ".shortcut.norm"),
        ),
    ),
    output=_output,
)
