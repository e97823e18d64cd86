"""Compares two records of ``trace``, array by array, leaving out what is rounding noise."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from triptych.core.checkpoint.manifest import flatten
from triptych.core.contracts import Array
from triptych.core.errors import UserError

TOLERANCES = {
    "float64": {"loss": 1e-10, "metric": 1e-10, "feature": 1e-10, "grad": 1e-8, "state": 1e-8},
    "float32": {"loss": 1e-5, "metric": 1e-5, "feature": 1e-4, "grad": 1e-3, "state": 1e-3},
}
"""Largest relative error by kind of number; float32 after one step, see tests/golden/README.md."""

NOISE = {"float64": 1e-9, "float32": 1e-5}
"""A gradient below this share of the whole gradient's norm is rounding noise, and truly 0."""


@dataclass(frozen=True)
class Difference:
    """One compared array: its relative error, max|a - b| / max|b|, and what was allowed."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the two agree; a nan never does."""
        return self.error <= self.allowed

    @property
    def severity(self) -> float:
        """The error in units of what was allowed; inf for any error where none was."""
        return self.error / self.allowed if self.allowed else (float("inf") if self.error else 0.0)


def relative_error(a: Array, b: Array) -> float:
    """max|a - b| / max|b|; 0 for two zeros, inf for different shapes or a nan on one side only."""
    if a.shape != b.shape:
        return float("inf")
    if a.size == 0 or np.array_equal(a, b):
        return 0.0
    gap = float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))
    return gap / max(float(np.max(np.abs(b))), 1e-300) if np.isfinite(gap) else float("inf")


def noise_names(record: Mapping[str, Array], dtype: str) -> set[str]:
    """Canonical names whose gradient is rounding noise at some step.

    AdamW divides such noise by its own size, so these tensors, their teacher twins and their
    moments wander freely and say nothing about correctness.
    """
    norms: dict[str, dict[str, float]] = {}
    for key in record:
        if key.startswith("grad/"):
            _, name, step = key.split("/")
            norms.setdefault(step, {})[name] = float(np.linalg.norm(record[key].astype(np.float64)))
    noise: set[str] = set()
    for of_step in norms.values():
        total = float(np.linalg.norm(list(of_step.values())))
        noise |= {name for name, norm in of_step.items() if norm <= NOISE[dtype] * total}
    return noise


SPEC = "spec"
"""Of a record: the bytes of the spec, without NOT_COMPARED, as JSON."""
NOT_COMPARED = {"backend", "deterministic", "device", "precision", "threads"}


def spec_differences(a: Mapping[str, Array], b: Mapping[str, Array]) -> dict[str, str]:
    """Dotted key -> both values, where two records are of different specs."""
    one, other = (
        dict(flatten(json.loads(record[SPEC].tobytes()))) if SPEC in record else {}
        for record in (a, b)
    )
    return {
        key: f"{one[key]} and {other[key]}"
        for key in one.keys() & other.keys()
        if one[key] != other[key]
    }


def compare(
    a: Mapping[str, Array], b: Mapping[str, Array], tolerances: Mapping[str, float] | None = None
) -> tuple[list[Difference], list[str]]:
    """Compares two records array by array.

    Args:
        tolerances: by kind (the first part of a name); default by the precision of ``a``'s loss.

    Returns:
        Differences, worst first in units of what is allowed, and the names left out as noise.

    Raises:
        UserError: the records do not hold the same arrays.
    """
    a, b = ({name: x for name, x in record.items() if name != SPEC} for record in (a, b))
    if set(a) != set(b):
        only = sorted(set(a) ^ set(b))
        raise UserError(f"the records hold different arrays: {', '.join(only[:5])} ({len(only)})")
    dtype = "float64" if b["loss"].dtype == a["loss"].dtype == np.float64 else "float32"
    allowed = {**TOLERANCES[dtype], **(tolerances or {})}
    noise = noise_names(b, dtype)
    found, left_out = [], []
    for name in a:
        if _is_noise(name, b, noise):
            left_out.append(name)
        else:
            error = relative_error(certain(name, a[name]), certain(name, b[name]))
            found.append(Difference(name, error, allowed[name.partition("/")[0]]))
    return sorted(found, key=lambda d: d.severity, reverse=True), left_out


def _is_noise(name: str, record: Mapping[str, Array], noise: set[str]) -> bool:
    kind, _, rest = name.partition("/")
    if kind not in ("grad", "state"):
        return False
    tensor = rest.partition("/")[0]
    for prefix in ("optimizer.exp_avg.", "optimizer.exp_avg_sq."):
        tensor = tensor.removeprefix(prefix)
    if tensor.replace("teacher.", "student.", 1) in noise:
        return True
    if not tensor.endswith("running_mean"):
        return False
    # The mean of a batch norm behind a norm without shift is 0 but for rounding.
    spread = np.sqrt(np.max(record[name.replace("running_mean", "running_var")]))
    return bool(np.max(np.abs(record[name])) < 1e-9 * spread)


def certain(name: str, array: Array) -> Array:
    """The part of an array that has a defined value: a key's bias never reaches the loss."""
    if ".attn.qkv.bias/" not in name:
        return array
    third = len(array) // 3
    return np.concatenate([array[:third], array[2 * third :]])
