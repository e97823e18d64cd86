"""A framework's own autograd behind one call, so that one test covers every backend."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from triptych.core.config.spec import RunSpec, SupervisedSpec
from triptych.core.contracts import Array, Batch, Hyper
from triptych.core.methods import METHODS


def differentiate(
    name: str, function: Callable[..., Any], *inputs: Array, probe: Array
) -> tuple[Array, list[Array]]:
    """The value of ``function(*inputs)`` and the gradients of sum(value * probe) by each input."""
    framework = importlib.import_module(name)
    leaves = [_leaf(name, framework, x) for x in inputs]
    value = function(*leaves)
    weights = framework.to_tensor(probe) if name == "paddle" else framework.from_numpy(probe)
    (value * weights).sum().backward()
    return np.array(value.detach().numpy()), [np.array(x.grad.numpy()) for x in leaves]


def _leaf(name: str, framework: ModuleType, x: Array) -> Any:
    if name == "paddle":
        return framework.to_tensor(x, stop_gradient=False)
    return framework.tensor(x).requires_grad_(True)


TINY: dict[str, dict[str, Any]] = {
    "moco_v3_vit": {
        "model": {
            "name": "vit",
            "width": 32,
            "depth": 2,
            "heads": 4,
            "patch_size": 4,
            "image_size": [8, 12],
        },
        "method": {"name": "moco_v3", "hidden_dim": 48, "output_dim": 16},
    },
    "moco_v3_vit_conv": {
        "model": {
            "name": "vit",
            "width": 32,
            "depth": 1,
            "heads": 4,
            "stem": "conv",
            "image_size": [32, 48],
        },
        "method": {"name": "moco_v3", "hidden_dim": 48, "output_dim": 16},
    },
    "moco_v3_resnet18": {
        "model": {"name": "resnet18", "width": 4, "image_size": [40, 56]},
        "method": {
            "name": "moco_v3",
            "hidden_dim": 48,
            "output_dim": 16,
            "projector_layers": 2,
            "predictor_last_norm": False,
        },
        "optim": {"name": "lars", "weight_decay": 0.01},
    },
    "moco_v1_resnet18": {
        "model": {"name": "resnet18", "width": 4, "stem": "small", "image_size": [8, 12]},
        "method": {"name": "moco_v1", "output_dim": 16, "queue_size": 20},
        "optim": {"name": "sgd"},
        "batch_norm": {"virtual_ranks": 2},
    },
    "moco_v2_bottleneck": {
        "model": {
            "name": "resnet",
            "block": "bottleneck",
            "depths": [1, 2, 1, 1],
            "width": 4,
            "stem": "small",
            "image_size": [16, 24],
        },
        "method": {"name": "moco_v2", "output_dim": 16, "hidden_dim": 24, "queue_size": 20},
        "optim": {"name": "sgd"},
    },
    "moca_vit": {
        "model": {
            "name": "vit",
            "width": 32,
            "depth": 3,
            "heads": 4,
            "patch_size": 4,
            "image_size": [12, 20],
            "freeze_patch_embed": False,
            "init": "moca",
        },
        "method": {
            "name": "moca",
            "words": 22,
            "new_words": 4,
            "border": 1,
            "early_layer": 1,
            "decoder_width": 24,
            "decoder_heads": 3,
            "decoder_depth": 1,
        },
        "optim": {"name": "adamw", "decay_on": "matrices", "generator_lr": 2e-3, "clip_norm": 0.5},
    },
}
"""Small models in which no two dimensions are equal; the queues are no multiple of the batch."""


def tiny_spec(
    precision: str = "float64", case: str = "moco_v3_vit", **sections: dict[str, Any]
) -> RunSpec:
    """One of ``TINY``, with a batch of 8, changed where ``sections`` say so."""
    given: dict[str, Any] = {
        "precision": precision,
        "threads": 1,
        "train": {"steps": 100, "batch_size": 8},
        **TINY[case],
    }
    for key, section in sections.items():
        given[key] = {**given.get(key, {}), **section}
    return RunSpec.model_validate(given)


def random_batch(spec: RunSpec, step: int = 0) -> Batch:
    """Normal images for a spec."""
    rng = np.random.default_rng([7, step])
    shape = (spec.train.batch_size, spec.model.channels, *spec.model.size)
    method = spec.method
    views = tuple(rng.standard_normal(shape).astype(np.float32) for _ in range(method.views))
    labels = None
    if isinstance(method, SupervisedSpec):
        labels = rng.integers(0, method.classes, spec.train.batch_size)
    return Batch(views, np.arange(spec.train.batch_size, dtype=np.int64), labels)


def pairs(spec: RunSpec) -> Batch:
    """Images that differ much, each in two similar views, as training has them."""
    rng = np.random.default_rng(5)
    shape = (spec.train.batch_size, spec.model.channels, *spec.model.size)
    coarse = 2 * rng.standard_normal((*shape[:2], 3, 3))
    rows, columns = (np.arange(size) * 3 // size for size in spec.model.size)
    images = coarse[:, :, rows][:, :, :, columns] + 0.1 * rng.standard_normal(shape)
    views = (images, images + 0.1 * rng.standard_normal(shape))
    return replace(random_batch(spec), views=tuple(view.astype(np.float32) for view in views))


def draws(spec: RunSpec, step: int = 0) -> dict[str, Array]:
    """What the method draws."""
    found: dict[str, Array] = METHODS[spec.method.name].draws(spec, step)
    return found


def hyper(step: int = 0, **changes: float) -> Hyper:
    """Lively hyper-parameters: three steps of them move every tensor."""
    return Hyper(**{"step": step, "lr": 1e-3, "weight_decay": 0.1, "ema": 0.9, **changes})


def lively_state(spec: RunSpec) -> dict[str, Array]:
    """A state without zeros or equal branches, so that no missed term can hide behind one."""
    from triptych.core import parameters

    rng = np.random.default_rng(3)
    state = parameters.initial_state(spec)
    for name, value in state.items():
        if value.dtype == np.float32 and not name.endswith(("running_var", "pos_embed")):
            state[name] = (value + 0.05 * rng.standard_normal(value.shape)).astype(np.float32)
    return state
