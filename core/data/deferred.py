"""Divides the changes of a view between the host and the device (``augment.on_device``)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triptych.core.config import spec
from triptych.core.contracts import Changes
from triptych.core.data import pixels
from triptych.core.data.augment import Change, arguments, operation
from triptych.core.data.views import box_weights, is_compiled
from triptych.core.methods.colours import OPERATIONS

CODES = tuple(OPERATIONS)
WIDTH = 4
"""Numbers of a change in a table: 1 + its place in ``CODES``, or 0 for none, and three values."""


def divided(changes: Sequence[Change]) -> tuple[list[Change], list[Change]]:
    """The changes of the host, and those that a device makes after them.

    The host mirrors, for that is part of the resize and commutes with all changes of colour.
    """
    last = max(i for i, change in enumerate(changes) if i == 0 or not is_compiled(change))
    host, rest = list(changes[: last + 1]), changes[last + 1 :]
    mirrors = [change for change in rest if change is pixels.horizontal_flip]
    return [*host, *mirrors], [change for change in rest if change is not pixels.horizontal_flip]


def length(ops: Sequence[spec.Op]) -> int:
    """The most changes of a recipe that a device makes."""
    return sum(4 if isinstance(op, spec.ColorJitter) else 1 for op in ops)


def write_table(changes: Sequence[Change], out: NDArray[np.float32]) -> None:
    """Writes changes of a device to the rows of a table (``length``, ``WIDTH``) of zeros."""
    for row, change in zip(out, changes, strict=False):
        name = operation(change).__name__
        values = _values(name, arguments(change))
        row[: 1 + len(values)] = (1 + CODES.index(name), *values)


def _values(name: str, given: dict[str, Any]) -> tuple[float, ...]:
    """The numbers of ``core.methods.colours`` for an operation; float32 holds them exactly."""
    if name == "hue":
        return (int(given["shift"] * 255) % 256,)
    if name == "gaussian_blur":
        return box_weights(given["radius"]) or ()
    return tuple(given.values())


def grouped(table: NDArray[np.float32]) -> tuple[Changes, ...]:
    """The changes of one view of a batch, with all images of one operation together.

    Args:
        table: (N, ``length``, ``WIDTH``).
    """
    groups = []
    for place in range(table.shape[1]):
        codes = table[:, place, 0]
        for code in np.unique(codes[codes > 0]):
            rows = np.flatnonzero(codes == code)
            groups.append(Changes(CODES[int(code) - 1], rows, table[rows, place, 1:]))
    return tuple(groups)
