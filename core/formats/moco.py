"""The official MoCo v1 and v2 release (facebookresearch/moco).

Both encoders have torchvision's names, as the canonical ones do. The head has the name of the
classifier: ``fc`` in v1, ``fc.0`` and ``fc.2`` in v2. Values and layouts are equal to ours, except
that the queue's pointer is a vector of length 1. The optimizer numbers the parameters of both
encoders, and has momentum for those of the query encoder.
"""

from triptych.core.files.tree import Node
from triptych.core.formats.arithmetic import Resnet
from triptych.core.formats.changes import VECTOR
from triptych.core.formats.envelopes import checkpoint
from triptych.core.formats.format import Format, Layout, Output
from triptych.core.formats.moments import Moments
from triptych.core.formats.networks import resnet
from triptych.core.formats.rules import Rule, Table, under
from triptych.core.formats.single import RESNET_CLASSIFIER, probe

BRANCHES = {"student": "encoder_q", "teacher": "encoder_k"}
"""Official prefixes, by canonical one."""


def _table(theirs: str, ours: str) -> Table:
    """The rules with a template for the layers of the head."""
    rules = [Rule("queue", "memory.queue"), Rule("queue_ptr", "memory.pointer", VECTOR)]
    for branch, official in BRANCHES.items():
        rules += under(f"{official}.", f"{branch}.encoder.", resnet())
        rules += [Rule(f"{official}.{theirs}", f"{branch}.projector.{ours}")]
    return Table(*rules)


def _layout(about: str, method: str, theirs: str, ours: str) -> Layout:
    marks = ("encoder_q.{rest}", "encoder_k.{rest}")
    order = ("queue", "encoder_q.", "encoder_k.")
    return Layout(
        about, "pretraining", _table(theirs, ours), marks, (method,), "resnet", order=order
    )


MOMENTS = Moments({"sgd": ("momentum_buffer",)})


def output(output: Output) -> tuple[str, Node]:
    """A checkpoint as the program writes it."""
    return "torch", checkpoint(output, MOMENTS)


FORMAT = Format(
    name="moco",
    about="MoCo v1 and v2 (facebookresearch/moco)",
    layouts=(
        _layout("MoCo v1 pretraining", "moco_v1", "fc.{leaf}", "0.{leaf}"),
        _layout("MoCo v2 pretraining", "moco_v2", "fc.{i}.{leaf}", "{i}.{leaf}"),
        probe(RESNET_CLASSIFIER),
    ),
    keys=frozenset({"epoch", "arch", "state_dict", "optimizer", "best_acc1"}),
    arithmetic=(Resnet({b: f"{name}." for b, name in BRANCHES.items()}), Resnet()),
    moments=MOMENTS,
    output=output,
)
