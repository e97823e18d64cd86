"""A framework's own autograd behind one call, so that one test covers every backend."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from triptych.core.config.spec import RunSpec
from triptych.core.engine import Array, Batch, Hyper


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


def tiny_spec(precision: str = "float64", **sections: dict[str, Any]) -> RunSpec:
    """MoCo v3 on a two-block ViT for 8x12 images: small, and no two dimensions are equal."""
    given: dict[str, Any] = {
        "precision": precision,
        "threads": 1,
        "model": {
            "name": "vit",
            "width": 32,
            "depth": 2,
            "heads": 4,
            "patch_size": 4,
            "image_size": [8, 12],
        },
        "method": {"name": "moco_v3", "hidden_dim": 48, "output_dim": 16},
        "train": {"steps": 100, "batch_size": 8},
    }
    for key, section in sections.items():
        given[key] = {**given.get(key, {}), **section}
    return RunSpec.model_validate(given)


def random_batch(spec: RunSpec, step: int = 0) -> Batch:
    """Normal images for a spec."""
    rng = np.random.default_rng([7, step])
    shape = (spec.train.batch_size, spec.model.channels, *spec.model.size)
    views = tuple(rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    return Batch(views, np.arange(spec.train.batch_size, dtype=np.int64))


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
