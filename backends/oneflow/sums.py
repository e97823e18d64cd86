"""Sums, means and choices of rows in the forms that are fast.

On the CPU a sum is a matrix product with ones, and a column is repeated by a product of rank one.
OneFlow's kernels for sums and for broadcasting a column are 10 to 500 times slower there. On a GPU
they are fast, and matrix products may be rounded to TF32.

Shape letters: N rows or images, T and L tokens, D columns, C channels, P positions of a map.
"""

from functools import lru_cache

import oneflow as flow
from oneflow import Tensor


def plain_forms_serve(x: Tensor) -> bool:
    """Whether to use OneFlow's own operations, which are fast on a GPU."""
    return bool(x.is_cuda)


@lru_cache(maxsize=128)
def constant(
    rows: int, columns: int, value: float, dtype: flow.dtype, device: flow.device
) -> Tensor:
    """A matrix of one value, which is kept. (rows, columns)."""
    return flow.full((rows, columns), value, dtype=dtype, device=device)


def row_mean(x: Tensor) -> Tensor:
    """The mean of each row. (N, D) -> (N, 1)."""
    if plain_forms_serve(x):
        return x.mean(1, keepdim=True)
    width = x.shape[1]
    return flow.matmul(x, constant(width, 1, 1.0 / width, x.dtype, x.device))


def column_sum(x: Tensor) -> Tensor:
    """The sum of each column. (N, D) -> (1, D)."""
    if plain_forms_serve(x):
        return x.sum(0, keepdim=True)
    return flow.matmul(constant(1, x.shape[0], 1.0, x.dtype, x.device), x)


def row_sum(x: Tensor) -> Tensor:
    """The sum of each row. (N, D) -> (N, 1)."""
    if plain_forms_serve(x):
        return x.sum(1, keepdim=True)
    return flow.matmul(x, constant(x.shape[1], 1, 1.0, x.dtype, x.device))


def repeat(x: Tensor, columns: int) -> Tensor:
    """Repeats a column. (N, 1) -> (N, columns), without rounding."""
    if plain_forms_serve(x):
        return x.expand(x.shape[0], columns)
    return flow.matmul(x, constant(1, columns, 1.0, x.dtype, x.device))


def unit_rows(x: Tensor, eps: float) -> Tensor:
    """x / max(|x|, eps). (N, D)."""
    # F.normalize bounds the squared norm by eps, in float32: rows near zero get wrong gradients.
    norm = row_sum(x * x).clamp(min=eps * eps).sqrt()
    return x * repeat(1.0 / norm, x.shape[1])


def channel_sum(x: Tensor) -> Tensor:
    """The sum of each channel. (N, C, P, 1) -> (1, C, 1, 1)."""
    if plain_forms_serve(x):
        return x.sum((0, 2, 3), keepdim=True)
    n, channels, positions, _ = x.shape
    rows = x.reshape(-1, positions)
    rows = rows if positions == 1 else row_sum(rows)
    return column_sum(rows.reshape(n, channels)).reshape(1, channels, 1, 1)


def centred_rows(x: Tensor) -> Tensor:
    """Each row minus its mean. (N, D)."""
    return x - repeat(row_mean(x), x.shape[1])


def pick_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """result[n, i] = x[n, ids[n, i]]. If x has one image only, it is used for every n.

    Args:
        x: (N, L, D) or (1, L, D).
        ids: (N, T) int64.
    """
    n, length, width = x.shape
    rows = ids
    if n > 1:
        # The kernel that gathers along the second axis needs an index as large as the result.
        rows = ids + (flow.arange(n, device=ids.device) * length).reshape(n, 1)
    picked = x.reshape(-1, width).index_select(0, rows.reshape(-1))
    return picked.reshape(*ids.shape, width)


def like_tokens(scale: Tensor, x: Tensor) -> Tensor:
    """Repeats a factor of each image for all its tokens. (N, 1, 1), (N, T, D) -> (N, T, D)."""
    n, length, width = x.shape
    return repeat(scale.reshape(n, 1), length * width).reshape(n, length, width)
