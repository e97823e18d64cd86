"""Weights, images and specs of the golden cases of the evaluation protocols.

They are made by the rules in ``golden/eval/README.md``.
"""

import json
from functools import lru_cache
from typing import Any

import numpy as np
from support.golden_weights import GOLDEN, RULES, Array

from triptych.core import parameters
from triptych.core.config.spec import RunSpec

EVAL = GOLDEN / "eval"
VIT: dict[str, Any] = {
    "name": "vit",
    "image_size": 64,
    "patch_size": 16,
    "width": 192,
    "depth": 3,
    "heads": 3,
}
"""The encoder of golden case moco_v3_vit_tiny."""
MOCA_VIT: dict[str, Any] = {
    **VIT,
    "patch_size": 8,
    "width": 96,
    "depth": 6,
    "freeze_patch_embed": False,
    "init": "moca",
}
"""The encoder of golden case moca_vit_tiny."""


@lru_cache(maxsize=4)
def case(name: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """The settings and the arrays of a case."""
    settings = json.loads((EVAL / f"{name}.json").read_text())
    with np.load(EVAL / f"{name}.npz") as arrays:
        return settings, dict(arrays)


def philox(key: int) -> np.random.Generator:
    """The generator of a rule."""
    return np.random.Generator(np.random.Philox(key=key))


def normal_images(key: int, count: int, height: int, width: int) -> Array:
    """Images of the fine-tuning and feature cases, float64."""
    images = philox(key).standard_normal((count, 3, height, width))
    return np.float32(images).astype(np.float64)


def classified_images(
    generator: np.random.Generator, classes: int, counts: tuple[int, int], size: int
) -> tuple[list[Array], list[Array]]:
    """Images around one prototype of each class, and their labels, for training and validation."""
    prototypes = generator.standard_normal((classes, 3, size, size))
    labels = [generator.integers(0, classes, count) for count in counts]
    images = []
    for known in labels:
        noise = generator.standard_normal((len(known), 3, size, size))
        images.append(np.float32(prototypes[known] + noise).astype(np.float64))
    return images, labels


def encoder_state(spec: RunSpec, prefix: str) -> dict[str, Array]:
    """The student's encoder as a pretraining state has it under ``prefix``, by canonical name.

    A norm that the pretraining state lacks (``fc_norm``) is a fresh one, by the rule of the head.
    """
    own = "student.encoder."
    state = {}
    for param in parameters.table(spec):
        if not param.name.startswith(own):
            continue
        name = param.name.removeprefix(own)
        official = name if name.startswith("fc_norm.") else prefix + name
        source = official.replace("encoder_teacher.", "encoder.")
        if name == "pos_embed":
            state[param.name] = position_table(prefix)
        else:
            rule = rule_of(name, param.shape, teacher=official != source)
            state[param.name] = RULES[rule](official, source, param.shape)
    return state


def rule_of(name: str, shape: tuple[int, ...], *, teacher: bool) -> str:
    """The rule of a tensor of an encoder."""
    if name == "cls_token":
        return "token:0.02z"
    if len(shape) > 1:
        return "matrix+key" if teacher else "matrix"
    kind = name.rpartition(".")[2]
    return {
        "weight": "norm_weight:1+0.1z",
        "bias": "bias:0.02z",
        "running_mean": "running_mean:0",
        "running_var": "running_var:1",
        "num_batches_tracked": "num_batches_tracked:0",
    }[kind]


def position_table(prefix: str) -> Array:
    """The position table of the pretraining case with this prefix, float64."""
    teacher = prefix == "encoder_teacher."
    file = "moca_vit_tiny" if teacher else "moco_v3_vit_tiny"
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        return arrays["encoder_pos_embed" if teacher else "pos_embed"].astype(np.float64)


def head_weight(name: str, shape: tuple[int, ...]) -> Array:
    """The first weights of a classifier under its official name, float64."""
    return RULES["head:0.01z"](name, name, shape)
