"""Resamples a table of positions from one grid of patches to another.

The arithmetic is that of PyTorch's bicubic interpolation with ``align_corners=False``: as MAE, MOCA
and DINO call it, and as timm does with antialiasing. It is separable, so each axis is one matrix.
"""

from math import isqrt
from typing import Literal

import numpy as np

from triptych.core.contracts import Array

Way = Literal["bicubic", "bicubic_antialias", "dino"]
Grid = tuple[int, int]
SHARP, SOFT = -0.75, -0.5
"""Parameter of the cubic kernel (Keys 1981): without antialiasing, and with it."""
EXTRA = 0.1
"""Patches that DINO adds to the size of the new grid against rounding. They change the step."""


def resample(table: Array, old: Grid, new: Grid, way: Way) -> Array:
    """The table of another grid. The class token's row stays as it is.

    Args:
        table: (1, 1 + rows * columns, D), the class token first, then the patches row by row.
        old: (rows, columns) of the table.
        new: (rows, columns) of the result.
        way: as in ``InitSpec.positions``.

    Returns:
        The resampled table in the type of ``table``; the arithmetic is float64.
    """
    if old == new:
        return table
    width = table.shape[2]
    patches = table[0, 1:].astype(np.float64).reshape(*old, width)
    rows, columns = (_matrix(a, b, way) for a, b in zip(old, new, strict=True))
    patches = np.einsum("ir,jc,rcd->ijd", rows, columns, patches, optimize=True)
    result = np.concatenate([table[0, :1], patches.reshape(-1, width)])[None]
    same_type: Array = result.astype(table.dtype)
    return same_type


def square_grid(table: Array) -> Grid | None:
    """The grid of a table of a square image; None if no square has that many patches."""
    side = isqrt(table.shape[1] - 1)
    return (side, side) if side * side == table.shape[1] - 1 else None


def _matrix(old: int, new: int, way: Way) -> Array:
    """Weights (new, old) of one axis."""
    step = old / (new + EXTRA if way == "dino" else new)
    centers = (np.arange(new) + 0.5) * step - 0.5
    if way == "bicubic_antialias":
        stretch = max(step, 1.0)
        weights = _cubic((np.arange(old) - centers[:, None]) / stretch, SOFT)
        weights /= weights.sum(axis=1, keepdims=True)
        return weights
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        source = np.floor(centers).astype(np.int64) + tap
        # A tap beyond the border reads the border.
        place = np.clip(source, 0, old - 1)
        np.add.at(weights, (np.arange(new), place), _cubic(centers - source, SHARP))
    return weights


def _cubic(distance: Array, a: float) -> Array:
    """Keys's kernel of support 2."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    result: Array = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return result
