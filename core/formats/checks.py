"""Checks of the queue or codebook in a file, and of the entries of an optimizer."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from triptych.core.contracts import Array, State
from triptych.core.files.tree import Stored
from triptych.core.formats.moments import COUNTS
from triptych.core.parameters import Param

UNIT = 1e-2
"""Allowed error of a unit vector's length. The error of half precision is far smaller."""
DISTANCES = ("memory.distance", "memory.distance_used")
"""Names of the numbers that set the temperature of MOCA's codes."""


def faults(state: State, params: Sequence[Param]) -> Iterator[str]:
    """A line for each tensor under ``memory.`` with the right shape and impossible values.

    Args:
        state: tensors by canonical name. The caller reports missing and misshapen tensors.
        params: of the model.
    """
    sizes = {"memory.queue": 1, "memory.words": 0}
    size = next((state[n].shape[axis] for n, axis in sizes.items() if _matrix(state, n)), None)
    for param in params:
        value = state.get(param.name)
        if value is None or value.shape != param.shape or not np.isfinite(value).all():
            continue
        if param.init.kind == "count":
            limit = size if param.name == "memory.pointer" else None
            yield from _count(param, value, limit)
        elif param.name in sizes:
            yield from _unit(param.name, value, axis=1 - sizes[param.name])
        elif param.name in DISTANCES and not (value > 0).all():
            yield f"{param.name}: expected a number > 0, got {value.item():g}"


def optimizer_faults(
    optimizer: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """A line for each entry of an optimizer that cannot belong to a model.

    Args:
        optimizer: entries by canonical name.
        shapes: of the model's tensors, by canonical name.
    """
    for name, tensor in optimizer.items():
        expected = () if name in COUNTS else shapes.get(name.split(".", 2)[2])
        if expected is None:
            yield f"unusable {name}: the model has no such tensor"
        elif tensor.shape != expected:
            yield f"misshapen {name}: expected {expected}, got {tensor.shape}"
        elif name in COUNTS and not (
            tensor.dtype.startswith(("int", "uint")) and tensor.array() >= 0
        ):
            yield f"unusable {name}: expected a whole number >= 0, got {tensor.array().item()}"
        elif name not in COUNTS and not tensor.dtype.startswith(("float", "bfloat")):
            yield f"unusable {name}: expected floating-point numbers, got {tensor.dtype}"


def _is_count(tensor: Stored) -> bool:
    return tensor.dtype.startswith(("int", "uint")) and bool(tensor.array() >= 0)


def _matrix(state: State, name: str) -> bool:
    return name in state and state[name].ndim == 2


def _count(param: Param, value: Array, limit: int | None) -> Iterator[str]:
    whole = value.dtype.kind in "iuf" and float(value) == int(value)
    if not (whole and value >= 0 and (limit is None or value < limit)):
        bound = "" if limit is None else f" below {limit}"
        yield f"{param.name}: expected a whole number >= 0{bound}, got {value.item()}"


def _unit(name: str, value: Array, axis: int) -> Iterator[str]:
    lengths = np.linalg.norm(value.astype(np.float64), axis=axis)
    far = np.flatnonzero(np.abs(lengths - 1.0) > UNIT)
    if far.size:
        yield (
            f"{name}: {far.size} of {lengths.size} vectors are not of length 1; the first is "
            f"number {far[0]}, of length {lengths[far[0]]:.3g}"
        )
