"""Our own names."""

from triptych.core.formats.arithmetic import networks
from triptych.core.formats.format import Format, Layout
from triptych.core.formats.rules import ANY, Rule, Table
from triptych.core.optim import scaling

PARTS = (
    *("encoder", "projector", "predictor", "classifier"),
    *("decoder", "image_predictor", "dense_predictor"),
)
"""The networks of student and teacher."""
NAMES = (
    *(f"{branch}.{part}.{{rest}}" for branch in ("student", "teacher") for part in PARTS),
    *("memory.{leaf}", "optimizer.step", "optimizer.{leaf}.student.{rest}", "foreign.{rest}"),
    *scaling.ENTRIES,
)

# Names from other systems stand behind "foreign." in their own spelling.
STATE = Layout(
    "a triptych state",
    "any",
    Table(*(Rule(name, name) for name in NAMES), norms=ANY),
    tuple(name for name in NAMES if not name.startswith("foreign.")),
    ("moco_v1", "moco_v2", "moco_v3", "moca", "linear", "finetune"),
)

ARITHMETIC = networks({branch: f"{branch}.encoder." for branch in ("student", "teacher")})

FORMAT = Format(name="canonical", about="triptych", layouts=(STATE,), arithmetic=ARITHMETIC)
