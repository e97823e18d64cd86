"""PaddleFleetX's MoCo v1 and v2 (PaddlePaddle/PaddleFleetX).

A checkpoint is a folder: ``model.pdparams`` has the weights, ``model_state.pdopt`` the optimizer,
``meta_state.pdopt`` epoch and step. Each branch is a sequence of encoder (0), hidden layer of the
head (1, nothing in v1) and last layer (2). The encoder has torchvision's names, Paddle's spelling
of the batch norms, and no counters of batches. Matrices are (in, out). The moving average of the
teacher covers the statistics of its batch norms.
"""

from dataclasses import replace

from triptych.core.files.tree import Content, Node
from triptych.core.formats.arithmetic import Resnet
from triptych.core.formats.changes import MATRICES, VECTOR
from triptych.core.formats.format import Format, Layout, Output
from triptych.core.formats.moments import Moments
from triptych.core.formats.networks import PADDLE_CPU, PADDLE_FACTS, resnet
from triptych.core.formats.optimizers import optimizer_state
from triptych.core.formats.rules import PADDLE, Rule, Table, under
from triptych.core.formats.single import STUDENT, SUPERVISED
from triptych.core.formats.unique import named

MODEL, STATE, META = "model.pdparams", "model_state.pdopt", "meta_state.pdopt"
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


def _state(content: Content) -> Node:
    """The state of the optimizer."""
    return content.tree.get(STATE) if isinstance(content.tree, dict) else None


MOMENTS = Moments({"sgd": ("velocity",)}, find=_state, link="flat")


def finished(content: Content) -> int | None:
    """The number of whole epochs. The engine saves at the end of an epoch, which counts from 0.

    A file of its own that is saved in the middle of an epoch looks the same.
    """
    meta = content.tree.get(META) if isinstance(content.tree, dict) else None
    epoch, step = (meta.get(key) if isinstance(meta, dict) else None for key in ("epoch", "step"))
    if not isinstance(epoch, int) or not isinstance(step, int) or epoch < 0:
        return None
    return epoch + (step > 0)


def output(output: Output) -> tuple[str, Node]:
    """The folder that the engine's ``load`` takes."""
    output = replace(output, tensors=named(output.tensors))
    step = output.step or 0
    # The engine goes on in this epoch, counted from 0, behind so many steps of it.
    meta = {"epoch": output.epoch, "step": 0, "cuda_rng_state": []}
    tree: dict[str, Node] = {MODEL: output.tensors, META: meta}
    if output.optimizer:
        rate = MOMENTS.options(output.spec, 0)["lr"]
        schedule = {"LR_Scheduler": {"last_epoch": step, "last_lr": rate}}
        tree[STATE] = {**optimizer_state(MOMENTS, output), **schedule}
    return "folder", tree


STATISTICS = ("_mean", "_variance")
"""Names of running mean and variance."""

FORMAT = Format(
    name="paddlefleetx",
    about="PaddleFleetX (PaddlePaddle/PaddleFleetX)",
    layouts=(
        _pretraining("moco_v1", {"2.fc": "0"}, "base_encoder.2.{rest}"),
        _pretraining("moco_v2", {"1.mlp.0": "0", "2.fc": "2"}, "base_encoder.1.mlp.{rest}"),
        PROBE,
    ),
    keys=frozenset({MODEL, STATE, META}),
    constants=PADDLE_FACTS,
    remarks=(PADDLE_CPU,),
    moments=MOMENTS,
    epochs=finished,
    arithmetic=(
        Resnet({b: f"{name}.0." for b, name in BRANCHES.items()}, statistics=STATISTICS),
        Resnet({"student": "0."}, statistics=STATISTICS),
    ),
    output=output,
)
