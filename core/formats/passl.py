"""PASSL's MoCo v3 (PaddlePaddle/PASSL).

A flat ``.pdparams``. The student has the names of PLSC. The momentum branch holds encoder (0) and
predictor (1), and counts its updates. The method has no predictor of the teacher.
"""

from triptych.core.files.tree import Node
from triptych.core.formats.arithmetic import PADDLE_STATISTICS, Vit
from triptych.core.formats.changes import TRANSPOSED
from triptych.core.formats.format import Format, Layout, Output
from triptych.core.formats.networks import vit
from triptych.core.formats.plsc import ENCODER, head
from triptych.core.formats.rules import PADDLE, Table, under
from triptych.core.formats.unique import layers_of, named

TEACHER = "momentum_encoder.model"


def output(output: Output) -> tuple[str, Node]:
    """A flat state."""
    return "paddle", named(output.tensors, layers_of(output.tensors), "mo_co_v3_vi_t")


FORMAT = Format(
    name="passl",
    about="PASSL (PaddlePaddle/PASSL)",
    layouts=(
        Layout(
            "MoCo v3 pretraining",
            "pretraining",
            Table(
                *under("base_encoder.", "student.encoder.", vit(TRANSPOSED)),
                *head("base_encoder.head", "student.projector"),
                *head("predictor", "student.predictor"),
                *under(f"{TEACHER}.0.", "teacher.encoder.", vit(TRANSPOSED)),
                *head(f"{TEACHER}.0.head", "teacher.projector"),
                norms=PADDLE,
            ),
            (f"{TEACHER}.0.{{rest}}",),
            ("moco_v3",),
            "vit",
            beside=(f"{TEACHER}.1.{{rest}}", "momentum_encoder.steps"),
        ),
        ENCODER,
    ),
    constants={"model.layer_norm_eps": 1e-6},
    output=output,
    arithmetic=(
        Vit(
            {"student": "base_encoder.", "teacher": f"{TEACHER}.0."},
            linear="in_out",
            statistics=PADDLE_STATISTICS,
        ),
        Vit(linear="in_out", statistics=PADDLE_STATISTICS),
    ),
)
