"""PLSC's MoCo v3 (PaddlePaddle/PLSC).

A ``.pd`` file is one nested dictionary; an extracted encoder is a flat ``.pdparams``. Names are
those of the official release, with Paddle's spelling of the batch norms and no counters of batches.
Matrices are (in, out). The moving average of the teacher covers the statistics of its batch norms.
The state of the optimizer is PyTorch's, with Paddle's generated names as keys; they are those of
the ``(name, values)`` pairs that tensors are in a nested file.
"""

from dataclasses import replace

import numpy as np

from triptych.core.config.spec import RunSpec
from triptych.core.files.tree import Node, Stored
from triptych.core.formats.arithmetic import PADDLE_STATISTICS, Vit
from triptych.core.formats.changes import MATRICES, TRANSPOSED
from triptych.core.formats.format import Format, Layout, Output
from triptych.core.formats.moments import KINDS, Moments, torch_options
from triptych.core.formats.networks import PADDLE_CPU, PADDLE_FACTS, vit
from triptych.core.formats.optimizers import optimizer_state
from triptych.core.formats.rules import PADDLE, Rule, Table, under
from triptych.core.formats.single import STUDENT, SUPERVISED
from triptych.core.formats.unique import REPLACED, layers_of, named

BRANCHES = {"student": "base_encoder", "teacher": "momentum_encoder"}
"""Prefixes in the file, by canonical one."""
HEADS = (*(f"{branch}.head." for branch in BRANCHES.values()), "predictor.")
ROOT = "vision_transformer_mo_co"
"""Generated name of the ViT's class."""
SCALER = {
    "incr_ratio": 2.0,
    "decr_ratio": 0.5,
    "incr_every_n_steps": 2000,
    "decr_every_n_nan_or_inf": 1,
    "incr_count": 0,
    "decr_count": 0,
    "use_dynamic_loss_scaling": True,
}
"""The state of a new ``paddle.amp.GradScaler``, without the scale."""
MARKS = ("cls_token", "patch_embed.{rest}")


def head(theirs: str, ours: str) -> list[Rule]:
    """The rules of a head of linear layers without bias and batch norms."""
    return [
        Rule(f"{theirs}.{{i}}.weight", f"{ours}.{{i}}.weight", MATRICES),
        Rule(f"{theirs}.{{i}}.{{leaf}}", f"{ours}.{{i}}.{{leaf}}"),
    ]


def _pretraining() -> Layout:
    rules = head("predictor", "student.predictor")
    for branch, theirs in BRANCHES.items():
        rules += under(f"{theirs}.", f"{branch}.encoder.", vit(TRANSPOSED))
        rules += head(f"{theirs}.head", f"{branch}.projector")
    table = Table(*rules, norms=PADDLE)
    marks = ("base_encoder.{rest}", "momentum_encoder.{rest}")
    return Layout("MoCo v3 pretraining", "pretraining", table, marks, ("moco_v3",), "vit")


ENCODER_RULES = under("", STUDENT, vit(TRANSPOSED))
CLASSIFIER_RULES = [
    Rule("head.weight", "student.classifier.weight", TRANSPOSED),
    Rule("head.bias", "student.classifier.bias"),
]
ENCODER = Layout(
    "a ViT encoder", "encoder", Table(*ENCODER_RULES, norms=PADDLE), MARKS, encoder="vit"
)
PROBE = Layout(
    "a linear probe",
    "linear probe",
    Table(*ENCODER_RULES, *CLASSIFIER_RULES, norms=PADDLE),
    ("head.weight",),
    SUPERVISED,
    "vit",
)


def built(tensors: dict[str, Stored]) -> list[str]:
    """The layers in the order in which PLSC builds them.

    Each branch begins with a classifier. The heads, built later, replace it.
    """
    layers = layers_of(tensors)
    order: list[str] = []
    for branch in BRANCHES.values():
        own = [n for n in layers if n.startswith(branch) and not n.startswith(f"{branch}.head.")]
        order += [*own, REPLACED] if own else []
    for start in HEADS:
        order += [layer for layer in layers if layer.startswith(start)]
    return order or layers


def options(spec: RunSpec, group: int) -> dict[str, Node]:
    """The hyper-parameters of a group."""
    found = torch_options(spec, group)
    names = ("lr", "betas", "eps", "momentum", "weight_decay")
    kept = {name: value for name, value in found.items() if name in names}
    return {**kept, "lr_func": None, "use_master_param": False, "grad_clip": None}


MOMENTS = Moments(
    {"adamw": KINDS["adamw"], "sgd": ("exp_avg",)}, link="name", step="integer", options=options
)


def output(output: Output) -> tuple[str, Node]:
    """The dictionary that PLSC resumes from, or the flat state of an encoder.

    Loss scale and best accuracy start anew.
    """
    output = replace(output, tensors=named(output.tensors, built(output.tensors), ROOT))
    if output.layout.kind == "encoder":
        return "paddle", output.tensors
    tree = {"epoch": output.epoch, "arch": "moco_vit", "state_dict": output.tensors}
    if output.optimizer:
        tree["optimizer"] = optimizer_state(MOMENTS, output)
    if output.layout.kind == "linear probe":
        return "paddle", {**tree, "best_acc1": Stored.of(np.zeros((), np.float32))}
    scale = {"scale": Stored.of(np.array([2.0**16], np.float32))}
    return "paddle", {**tree, "scaler": {**scale, **SCALER}}


FORMAT = Format(
    name="plsc",
    about="PLSC (PaddlePaddle/PLSC)",
    layouts=(_pretraining(), PROBE, ENCODER),
    keys=frozenset({"epoch", "arch", "state_dict", "optimizer", "scaler", "best_acc1"}),
    constants={"model.layer_norm_eps": 1e-6, **PADDLE_FACTS},
    remarks=(PADDLE_CPU,),
    moments=MOMENTS,
    arithmetic=(
        Vit(
            {b: f"{name}." for b, name in BRANCHES.items()},
            linear="in_out",
            statistics=PADDLE_STATISTICS,
        ),
        Vit(linear="in_out", statistics=PADDLE_STATISTICS),
    ),
    output=output,
)
