"""PaddleFleetX's MoCo v1 and v2 (PaddlePaddle/PaddleFleetX).

A checkpoint is a folder: ``model.pdparams`` has the weights, ``model_state.pdopt`` the optimizer,
``meta_state.pdopt`` epoch and step. Each branch is a sequence of encoder (0), hidden layer of the
head (1, nothing in v1) and last layer (2). The encoder has torchvision's names, Paddle's spelling
of the batch norms, and no counters of batches. Matrices are (in, out).
"""

from triptych.core.files.tree import Node
from triptych.core.formats.changes import MATRICES, VECTOR
from triptych.core.formats.format import Format, Layout, Output
from triptych.core.formats.networks import resnet
from triptych.core.formats.rules import PADDLE, Rule, Table, under
from triptych.core.formats.single import STUDENT, SUPERVISED
from triptych.core.formats.unique import named

MODEL, OPTIMIZER, META = "model.pdparams", "model_state.pdopt", "meta_state.pdopt"
"""Names of the three files."""
BRANCHES = {"student": "base_encoder", "teacher": "momentum_encoder"}
"""Prefixes in the file, by canonical one."""


def _linear(theirs: str, ours: str) -> list[Rule]:
    """The rules of a layer with bias."""
    return [
        Rule(f"{theirs}.weight", f"{ours}.weight", MATRICES),
        Rule(f"{theirs}.bias", f"{ours}.bias"),
    ]


def _pretraining(method: str, head: dict[str, str], mark: str) -> Layout:
    """A layout of both branches and the queue.

    Args:
        method: of the run.
        head: positions of the head's layers, by name in the file.
        mark: what only such files have.
    """
    rules = [Rule("queue", "memory.queue"), Rule("queue_ptr", "memory.pointer", VECTOR)]
    for branch, theirs in BRANCHES.items():
        rules += under(f"{theirs}.0.", f"{branch}.encoder.", resnet())
        for layer, place in head.items():
            rules += _linear(f"{theirs}.{layer}", f"{branch}.projector.{place}")
    about = f"MoCo {method[-2:]} pretraining"
    return Layout(about, "pretraining", Table(*rules, norms=PADDLE), (mark,), (method,), "resnet")


PROBE = Layout(
    "a linear probe",
    "linear probe",
    Table(
        *under("0.", STUDENT, resnet()),
        *_linear("1.fc", "student.classifier"),
        norms=PADDLE,
    ),
    ("1.fc.weight",),
    SUPERVISED,
    "resnet",
)


def output(made: Output) -> tuple[str, Node]:
    """The folder that the engine's ``load`` takes. An epoch is not known here; it starts at 0."""
    meta = {"epoch": 0, "step": made.step or 0, "cuda_rng_state": []}
    model = named(made.tensors)
    return "folder", {MODEL: model, META: meta}


FORMAT = Format(
    name="paddlefleetx",
    about="PaddleFleetX (PaddlePaddle/PaddleFleetX)",
    layouts=(
        _pretraining("moco_v1", {"2.fc": "0"}, "base_encoder.2.{rest}"),
        _pretraining("moco_v2", {"1.mlp.0": "0", "2.fc": "2"}, "base_encoder.1.mlp.{rest}"),
        PROBE,
    ),
    keys=frozenset({MODEL, OPTIMIZER, META}),
    output=output,
)
