"""Initial values. NumPy draws them from the run's seed, so they are the same on every backend."""

import numpy as np

from triptych.core.contracts import Array
from triptych.core.parameters.param import Param
from triptych.core.random import stream


def initial_value(param: Param, seed: int) -> Array:
    """The initial value of one tensor.

    It is drawn in float64 and rounded to float32, so that all precisions start equally.
    """
    init = param.init
    if init.kind == "count":
        return np.zeros(param.shape, np.int64)
    if init.kind == "constant":
        return np.full(param.shape, init.value, np.float32)
    if init.kind == "sincos":
        return sincos_2d(*init.grid, param.shape[-1], column_first=init.column_first)
    rng = stream(seed, f"init/{param.name}")
    if init.kind == "uniform":
        return rng.uniform(-init.value, init.value, param.shape).astype(np.float32)
    value: Array = rng.standard_normal(param.shape)
    scale = init.value
    if init.kind == "unit_columns":
        scale = 1.0 / np.linalg.norm(value, axis=0)
    elif init.kind == "positive_rows":
        value = np.maximum(value, 0.0)
        # In a very short row all values may be negative, and its norm 0.
        scale = 1.0 / np.maximum(np.linalg.norm(value, axis=1, keepdims=True), 1e-12)
    return (value * scale).astype(np.float32)


def sincos_2d(rows: int, columns: int, width: int, *, column_first: bool = False) -> Array:
    """The position table of MoCo v3: zeros for the class token, then row-major patches.

    The row of the patch at (r, c) is [sin(r w), cos(r w), sin(c w), cos(c w)]. Each of the four
    parts has width/4 channels, with w_k = 10000^(-k / (width/4)).

    Args:
        rows: of patches.
        columns: of patches.
        width: of a token.
        column_first: the table of MOCA: c comes before r, and angles are rounded to float32.

    Returns:
        (1, 1 + rows*columns, width), float32.
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    first, second = (c, r) if column_first else (r, c)
    if column_first:
        omega = omega.astype(np.float32)
    angles = [position.reshape(-1, 1).astype(omega.dtype) * omega for position in (first, second)]
    patches = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    table: Array = np.concatenate([np.zeros((1, width)), patches])[None].astype(np.float32)
    return table
