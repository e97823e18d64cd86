"""Images and draws of a trace from a file, in place of the spec's own."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from triptych.core import formats, methods
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, Batch, State
from triptych.core.errors import UserError

VIEWS = ("view1", "view2")
KINDS = {"f": "real numbers", "i": "whole numbers"}
"""Kinds of NumPy types as a user reads them; unsigned ones are whole, too."""


def recorded(
    path: Path, spec: RunSpec, steps: int
) -> tuple[Iterator[Batch], Callable[[int], Mapping[str, Array]]]:
    """Batches, and the draws of a step.

    Args:
        path: npz of ``view1``, ``view2`` (steps, N, C, H, W) and, under their names, either none
            of the method's draws or all of them, each with the steps as its first axis.

    Raises:
        UserError: no such file, an array too few or too many, of another shape or type, for fewer
            steps than asked for, or draws that no run could draw.
    """
    arrays = formats.read_arrays(path)
    method = methods.METHODS[spec.method.name]
    shape = (spec.train.batch_size, spec.model.channels, *spec.model.size)
    wanted = {name: np.empty(shape, np.float32) for name in VIEWS}
    if arrays.keys() - VIEWS:
        wanted |= method.draws(spec, 0)
    _check_arrays(path, arrays, wanted, steps)
    arrays = {name: _plain(array) for name, array in arrays.items()}
    index = np.arange(spec.train.batch_size, dtype=np.int64)
    pairs = zip(*(arrays.pop(name) for name in VIEWS), strict=False)
    batches = (Batch(pair, index) for pair in pairs)
    if not arrays:
        return batches, partial(method.draws, spec)

    def draws(step: int) -> Mapping[str, Array]:
        return {name: array[step] for name, array in arrays.items()}

    for step in range(steps):
        try:
            method.check_draws(spec, draws(step))
        except ValueError as error:
            raise UserError(f"{path}: step {step}: {error}") from error
    return batches, draws


def _plain(array: Array) -> Array:
    """In a type that every framework knows: some know no unsigned and no extended numbers."""
    if array.dtype.kind in "iu":
        return array.astype(np.int64, copy=False)
    return array.astype(np.float64) if array.dtype.itemsize > 8 else array


def _check_arrays(path: Path, arrays: State, wanted: Mapping[str, Array], steps: int) -> None:
    for names, told in (
        (wanted.keys() - arrays.keys(), "missing"),
        (arrays.keys() - wanted.keys(), "not among what the spec's method reads"),
    ):
        if names:
            listed = ", ".join(sorted(names))
            raise UserError(f"{path}: {listed}: {told}; expected {', '.join(wanted)}")
    for name, one in wanted.items():
        found = arrays[name]
        if found.shape[1:] != one.shape or found.ndim != one.ndim + 1:
            raise UserError(
                f"{path}: {name}: shape {found.shape}, expected (steps, *{one.shape}) by the spec"
            )
        if found.dtype.kind.replace("u", "i") != one.dtype.kind:
            raise UserError(f"{path}: {name}: {found.dtype}, expected {KINDS[one.dtype.kind]}")
        if len(found) < steps:
            raise UserError(f"{path}: {name} holds {len(found)} steps, --steps is {steps}")
