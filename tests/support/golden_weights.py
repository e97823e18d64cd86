"""Weights and images of the golden cases, made from the rules in ``golden/README.md``."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

Array = NDArray[Any]


@lru_cache(maxsize=2)
def description(case: str) -> dict[str, Any]:
    """The case's JSON file."""
    return json.loads((GOLDEN / f"{case}.json").read_text())


@lru_cache(maxsize=1)
def official_state(case: str) -> dict[str, Array]:
    """The initial state dict under the reference's own names: float64, integers int64."""
    with np.load(GOLDEN / f"{case}.npz") as arrays:
        tables = {name: arrays[name] for name in arrays.files if name.endswith("pos_embed")}
    state = {}
    for entry in description(case)["state"]:
        if entry["rule"] == "fixed_sincos":
            own = "decoder" if entry["name"].startswith("decoder") else "encoder"
            table = tables.get(f"{own}_pos_embed", tables.get("pos_embed"))
            state[entry["name"]] = table.astype(np.float64)
            continue
        name, shape = entry["name"], tuple(entry["shape"])
        array = RULES[entry["rule"]](name, entry.get("counterpart", name), shape)
        state[name] = array.astype(np.int64 if "int" in entry["dtype"] else np.float64)
    return state


def views(case: str, step: int) -> tuple[Array, Array]:
    """The two views of a step, (N, 3, H, W), float64."""
    config = description(case)["config"]
    shape = (config.get("N", config.get("N_per_view")), 3, config["img"], config["img"])
    return tuple(
        np.float32(_philox(1000 + 10 * step + view).standard_normal(shape)).astype(np.float64)
        for view in (1, 2)
    )


def probe(array: Array) -> float:
    """A tensor's inner product with the golden probe vector."""
    numbers = array.astype(np.float64).ravel()
    return float(numbers @ _probe_vector(1 << (numbers.size - 1).bit_length())[: numbers.size])


@lru_cache
def _probe_vector(size: int) -> Array:
    """The first numbers of one fixed stream: a longer vector begins with every shorter one."""
    return _philox(7).standard_normal(size)


def _philox(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


def normal(name: str, shape: tuple[int, ...]) -> Array:
    """The standard normal values that the rules give a name."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return _philox(key).standard_normal(shape)


def _rounded(array: Array) -> Array:
    return np.float32(array).astype(np.float64)


def _matrix(name: str, shape: tuple[int, ...]) -> Array:
    return _rounded(normal(name, shape) / np.sqrt(int(np.prod(shape[1:]))))


def _unit_columns(array: Array) -> Array:
    return array / np.sqrt((array * array).sum(0, keepdims=True))


def _unit_rows(array: Array) -> Array:
    return array / np.sqrt((array * array).sum(1, keepdims=True))


RULES = {
    "matrix": lambda name, source, shape: _matrix(name, shape),
    "matrix+key": lambda name, source, shape: _rounded(
        _matrix(source, shape) + 0.01 * normal(name, shape)
    ),
    "norm_weight:1+0.1z": lambda _, source, shape: _rounded(1 + 0.1 * normal(source, shape)),
    "bias:0.02z": lambda _, source, shape: _rounded(0.02 * normal(source, shape)),
    "token:0.02z": lambda _, source, shape: _rounded(0.02 * normal(source, shape)),
    "head:0.01z": lambda name, _, shape: _rounded(0.01 * normal(name, shape)),
    "running_mean:0": lambda _, source, shape: np.zeros(shape),
    "running_var:1": lambda _, source, shape: np.ones(shape),
    "num_batches_tracked:0": lambda _, source, shape: np.zeros(shape),
    "queue": lambda name, _, shape: _rounded(_unit_columns(normal(name, shape))),
    "codebook": lambda name, _, shape: _rounded(_unit_rows(np.maximum(normal(name, shape), 0))),
    "dist_norm:0.5": lambda _, source, shape: np.full(shape, 0.5),
    "scale:kappa": lambda _, source, shape: np.full(shape, 3.0),
    "_embedding_ptr:0": lambda _, source, shape: np.zeros(shape),
    "_track_num_batches:0": lambda _, source, shape: np.zeros(shape),
    "queue_ptr:0": lambda _, source, shape: np.zeros(shape),
}
"""README section 1: (name, the tensor that an EMA tensor is derived from, shape) -> values."""
