"""Our own names in a file of Paddle, and paddle.vision's residual networks.

paddle.vision has torchvision's names, Paddle's spelling of the batch norms, no counters of batches,
and a classifier (in, out).
"""

from dataclasses import replace

from triptych.core.files.tree import Node
from triptych.core.formats.arithmetic import Resnet
from triptych.core.formats.canonical import ARITHMETIC, STATE
from triptych.core.formats.changes import TRANSPOSED
from triptych.core.formats.format import Format, Output
from triptych.core.formats.networks import resnet
from triptych.core.formats.rules import PADDLE, Rule, Table, under
from triptych.core.formats.single import RESNET_CLASSIFIER, RESNET_ENCODER, STUDENT
from triptych.core.formats.unique import named

RULES = under("", STUDENT, resnet())
CLASSIFIER = replace(
    RESNET_CLASSIFIER,
    table=Table(
        *RULES,
        Rule("fc.weight", "student.classifier.weight", TRANSPOSED),
        Rule("fc.bias", "student.classifier.bias"),
        norms=PADDLE,
    ),
)
ENCODER = replace(RESNET_ENCODER, table=Table(*RULES, norms=PADDLE), marks=("bn1._mean",))


def output(made: Output) -> tuple[str, Node]:
    """One dictionary for ``paddle.load``, which makes tensors of those that have another name."""
    if made.layout is not STATE:
        return "paddle", named(made.tensors)
    tensors = {**made.tensors, **made.optimizer}
    return "paddle", {name: replace(t, unique=name) for name, t in tensors.items()}


FORMAT = Format(
    name="paddle",
    about="our own names, for paddle.load; paddle.vision",
    layouts=(STATE, CLASSIFIER, ENCODER),
    containers=("paddle",),
    arithmetic=(*ARITHMETIC, Resnet(statistics=("_mean", "_variance"))),
    output=output,
)
