"""Compares two records of ``trace`` array by array, without the arrays that are rounding noise."""

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
"""Largest allowed relative error by precision and kind of array.

Those of float32 hold after one step (tests/golden/README.md)."""

NOISE = {"float64": 1e-9, "float32": 1e-5}
"""A gradient with a smaller share of the norm of all gradients is rounding noise of a true 0."""


@dataclass(frozen=True)
class Difference:
    """One compared array.

    Attributes:
        name: of the array.
        error: relative error, max|a - b| / max|b|.
        allowed: largest allowed relative error.
    """

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is allowed. A nan never is."""
        return self.error <= self.allowed

    @property
    def severity(self) -> float:
        """The error in units of what was allowed; inf for any error where none was."""
        return self.error / self.allowed if self.allowed else (float("inf") if self.error else 0.0)


def relative_error(a: Array, b: Array) -> float:
    """The relative error max|a - b| / max|b|.

    It is 0 for equal arrays, and inf if the shapes differ or an array has a nan.
    """
    if a.shape != b.shape:
        return float("inf")
    if a.size == 0 or np.array_equal(a, b):
        return 0.0
    gap = float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))
    return gap / max(float(np.max(np.abs(b))), 1e-300) if np.isfinite(gap) else float("inf")


def noise_names(record: Mapping[str, Array], dtype: str) -> set[str]:
    """Canonical names of the tensors whose gradient is rounding noise at some step.

    AdamW divides the noise by its own size. These tensors, the teacher's copies and the moments
    therefore drift at random and say nothing about correctness.
    """
    norms: dict[str, dict[str, float]] = {}
    for key in record:
        if key.startswith("grad/"):
            _, name, step = key.split("/")
            norms.setdefault(step, {})[name] = float(np.linalg.norm(record[key].astype(np.float64)))
    noise: set[str] = set()
    for step_norms in norms.values():
        total = float(np.linalg.norm(list(step_norms.values())))
        noise |= {name for name, norm in step_norms.items() if norm <= NOISE[dtype] * total}
    return noise


SPEC = "spec"
"""Name of a record's array with the spec: the bytes of JSON, without the keys NOT_COMPARED."""
NOT_COMPARED = {"backend", "deterministic", "device", "precision", "threads"}
"""Keys of the spec in which two records may differ."""


def spec_differences(a: Mapping[str, Array], b: Mapping[str, Array]) -> dict[str, str]:
    """The differences between the specs of two records.

    Returns:
        A text with both values, by the dotted key whose values differ.
    """
    first, second = (
        dict(flatten(json.loads(record[SPEC].tobytes()))) if SPEC in record else {}
        for record in (a, b)
    )
    return {
        key: f"{first[key]} and {second[key]}"
        for key in first.keys() & second.keys()
        if first[key] != second[key]
    }


def compare(
    a: Mapping[str, Array], b: Mapping[str, Array], tolerances: Mapping[str, float] | None = None
) -> tuple[list[Difference], list[str]]:
    """Compares two records array by array.

    Args:
        a: a record.
        b: the record to compare with.
        tolerances: allowed relative errors by kind, which is the first part of a name. They
            replace those of TOLERANCES for the precision of the losses.

    Returns:
        The differences, the most severe first, and the names omitted as noise.

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
    differences, omitted = [], []
    for name in a:
        if _is_noise(name, b, noise):
            omitted.append(name)
        else:
            error = relative_error(certain(name, a[name]), certain(name, b[name]))
            differences.append(Difference(name, error, allowed[name.partition("/")[0]]))
    return sorted(differences, key=lambda d: d.severity, reverse=True), omitted


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
    # After a norm without shift, the mean of a batch norm is 0 except for rounding.
    spread = np.sqrt(np.max(record[name.replace("running_mean", "running_var")]))
    return bool(np.max(np.abs(record[name])) < 1e-9 * spread)


def certain(name: str, array: Array) -> Array:
    """The part of an array whose value is defined: the bias of the keys never affects the loss."""
    if ".attn.qkv.bias/" not in name:
        return array
    third = len(array) // 3
    return np.concatenate([array[:third], array[2 * third :]])
