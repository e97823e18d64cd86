"""Batch norm in NumPy, which is faster than OneFlow's operations on the CPU.

No function changes its input. Non-finite values give no warning here; they show in the loss.

Shape letters: R virtual ranks, N images, C channels, P positions.
"""

from collections.abc import Callable

import numpy as np

from triptych.backends.oneflow.kernels import quiet
from triptych.core.contracts import Array

Total = Callable[[Array, float], tuple[Array, float]]
"""Adds up sums of channels and their number of values over the processes that share them."""


def alone(sums: Array, count: float) -> tuple[Array, float]:
    """The sums of a process that shares them with no other."""
    return sums, count


@quiet
def normalize(
    x: Array, affine: Array, eps: float, *, keep: bool, total: Total = alone
) -> tuple[Array, Array, Array, Array, float]:
    """Batch norm of each virtual rank separately.

    Args:
        x: (R, N, C, P).
        affine: (2, C), gain and shift.
        keep: whether to keep the second result. Otherwise the first result overwrites it.
        total: what other processes add to the statistics.

    Returns:
        (R, N, C, P), the result.
        (R, N, C, P), x minus the means of its channels.
        (R, C), 1 / standard deviation.
        (2, C), mean and unbiased variance of the first rank.
        Number of values of a channel.
    """
    sums, count = total(_sums(x), x.shape[1] * x.shape[3])
    mean = sums / count
    centred = x - _per_channel(mean, x)
    square, count = total(_dots(centred, centred), x.shape[1] * x.shape[3])
    inverse = 1.0 / np.sqrt(square / count + eps)
    factor = _per_channel(affine[0] * inverse, x)
    y = np.multiply(centred, factor, out=None if keep else centred)
    y += affine[1].reshape(-1, 1)
    statistics = np.stack([mean[0], square[0] / (count - 1)])
    return y, centred, inverse.astype(x.dtype), statistics.astype(x.dtype), count


@quiet
def normalize_backward(
    centred: Array, factors: Array, grad: Array, total: Total = alone
) -> tuple[Array, Array, Array]:
    """The gradients of batch norm with respect to x, gain and shift.

    Those of gain and shift are the part of this process.

    Args:
        centred: (R, N, C, P), second result of ``normalize``.
        factors: (1 + R, C), the gain, then the rows of 1 / standard deviation.
        grad: (R, N, C, P).
        total: as in ``normalize``.
    """
    gain, inverse = factors[0], factors[1:]
    own = np.stack([_sums(grad), _dots(grad, centred) * inverse])
    (whole, along), count = total(own, grad.shape[1] * grad.shape[3])
    grad_x: Array = centred * _per_channel(along * inverse / -count, grad)
    grad_x += grad
    grad_x -= _per_channel(whole / count, grad)
    grad_x *= _per_channel(gain * inverse, grad)
    of_shift, of_gain = own.sum(1).astype(grad.dtype)
    return grad_x, of_gain, of_shift


def _per_channel(values: Array, like: Array) -> Array:
    return values.astype(like.dtype)[:, None, :, None]


def _sums(x: Array) -> Array:
    """Sums over images and positions. (R, N, C, P) -> (R, C), float64."""
    ones = np.ones(x.shape[3], x.dtype)
    rows: Array = x.reshape(-1, x.shape[3]) @ ones
    return rows.reshape(x.shape[:3]).sum(1, dtype=np.float64)


def _dots(x: Array, y: Array) -> Array:
    """Inner products over images and positions. Two (R, N, C, P) -> (R, C), float64."""
    rows = np.einsum("ij,ij->i", x.reshape(-1, x.shape[3]), y.reshape(-1, x.shape[3]))
    return rows.reshape(x.shape[:3]).sum(1, dtype=np.float64)
