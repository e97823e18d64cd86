"""Convolutions and batch norm of maps with channels last, in NumPy.

In this order of memory, a convolution with a kernel of 1 is a product of rows, without a copy, and
what a larger kernel reads is in runs of all channels of neighbouring positions.

Non-finite values give no warning here; they show in the loss.

Shape letters: N images, H and W sides of a map, h and w sides of a convolution's result, C and O
channels, K side of a kernel, R virtual ranks, M rows of a rank: its images times positions.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from triptych.backends.oneflow import threads
from triptych.backends.oneflow.channels import Total, alone
from triptych.backends.oneflow.kernels import BLOCK, as_rows, quiet
from triptych.core.contracts import Array

Place = tuple[int, slice]
"""A virtual rank, and some of its rows."""
ROWS = 512  # least number of rows in a matrix product
TERMS = 128  # greatest number of terms in a sum of float32, which keeps its digits


def channels_last(x: Array) -> Array:
    """(N, C, H, W) -> (N, H, W, C), a new array."""
    return x.transpose(0, 2, 3, 1).copy()


def channels_first(x: Array) -> Array:
    """(N, H, W, C) -> (N, C, H, W), a new array."""
    return x.transpose(0, 3, 1, 2).copy()


@quiet
def convolve(x: Array, weight: Array, stride: int, padding: int) -> Array:
    """A convolution, computed as matrix products of a few rows of a map each.

    Args:
        x: (N, H, W, C).
        weight: (O, C, K, K).

    Returns:
        (N, h, w, O).
    """
    fan_out, _, kernel, _ = weight.shape
    windows = _windows(_padded(x, padding), kernel, stride)
    y = np.empty((*windows.shape[:3], fan_out), x.dtype)
    matrix = _matrix(weight).T
    for part in _parts(y):
        np.matmul(_columns(windows[part]), matrix, out=as_rows(y[part]))
    return y


@quiet
def convolve_backward(
    x: Array, weight: Array, grad: Array, stride: int, padding: int, *, of_x: bool
) -> tuple[Array | None, Array]:
    """The gradients of ``convolve`` with respect to x, if ``of_x`` is set, and to weight.

    Args:
        grad: (N, h, w, O).
    """
    of_weight = _of_weight(x, weight, grad, stride, padding)
    return _of_input(x, weight, grad, stride, padding) if of_x else None, of_weight


def _of_weight(x: Array, weight: Array, grad: Array, stride: int, padding: int) -> Array:
    fan_out, fan_in, kernel, _ = weight.shape
    windows = _windows(_padded(x, padding), kernel, stride)
    products = (as_rows(grad[part]).T @ _columns(windows[part]) for part in _parts(grad))
    found = next(products)
    for product in products:
        found += product
    by_position = found.reshape(fan_out, kernel, kernel, fan_in)
    return np.ascontiguousarray(by_position.transpose(0, 3, 1, 2))


def _of_input(x: Array, weight: Array, grad: Array, stride: int, padding: int) -> Array:
    kernel = weight.shape[2]
    if stride == 1:
        turned = weight[:, :, ::-1, ::-1].swapaxes(0, 1)
        return convolve(grad, turned, 1, kernel - 1 - padding)
    padded = _padded(np.zeros_like(x), padding)
    columns = (as_rows(grad) @ _matrix(weight)).reshape(*grad.shape[:3], kernel * kernel, -1)
    for tap, inputs in enumerate(_taps(padded, kernel, stride, grad)):
        inputs += columns[:, :, :, tap]
    return _inside(padded, padding)


POOL = 3, 2, 1
"""Kernel, stride and padding of ``max_pool``."""


@quiet
def max_pool(x: Array) -> Array:
    """The maximum of each window of a map without negative values. (N, H, W, C) -> (N, h, w, C)."""
    kernel, stride, padding = POOL
    n, *sides, channels = x.shape
    size = ((side + 2 * padding - kernel) // stride + 1 for side in sides)
    y = np.zeros((n, *size, channels), x.dtype)
    for inputs in _taps(_padded(x, padding), kernel, stride, y):
        np.maximum(y, inputs, out=y)
    return y


@quiet
def max_pool_backward(x: Array, y: Array, grad: Array) -> Array:
    """The gradient of ``max_pool``, all of it for the first one of equal values. grad: as y."""
    kernel, stride, padding = POOL
    padded, given = (_padded(each, padding) for each in (x, np.zeros_like(x)))
    rest = grad.copy()
    taps = (_taps(each, kernel, stride, y) for each in (padded, given))
    for inputs, gradients in zip(*taps, strict=True):
        share = rest * (inputs == y)
        gradients += share
        rest -= share
    return _inside(given, padding)


def _matrix(weight: Array) -> Array:
    """(O, C, K, K) -> (O, K * K * C)."""
    return weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)


def _taps(padded: Array, kernel: int, stride: int, result: Array) -> Iterator[Array]:
    """For each position in a kernel, a view of what a result reads there. (N, h, w, C)."""
    _, height, width, _ = result.shape
    for i, j in itertools.product(range(kernel), repeat=2):
        yield padded[:, i : i + stride * height : stride, j : j + stride * width : stride]


def _padded(x: Array, padding: int) -> Array:
    if padding == 0:
        return np.ascontiguousarray(x)
    n, height, width, channels = x.shape
    padded = np.zeros((n, height + 2 * padding, width + 2 * padding, channels), x.dtype)
    padded[:, padding : padding + height, padding : padding + width] = x
    return padded


def _inside(padded: Array, padding: int) -> Array:
    """The reverse of ``_padded``."""
    _, height, width, _ = padded.shape
    return np.ascontiguousarray(padded[:, padding : height - padding, padding : width - padding])


def _windows(padded: Array, kernel: int, stride: int) -> Array:
    """What each position of a result reads, without a copy. (N, H, W, C) -> (N, h, w, K, K * C)."""
    n, *sides, channels = padded.shape
    size = ((side - kernel) // stride + 1 for side in sides)
    image, row, place, value = padded.strides
    steps = image, stride * row, stride * place, row, value
    shape = n, *size, kernel, kernel * channels
    return np.lib.stride_tricks.as_strided(padded, shape, steps, writeable=False)


def _columns(windows: Array) -> Array:
    """(N, h, w, K, K * C) -> (N * h * w, K * K * C), a copy unless the kernel is 1."""
    return windows.reshape(-1, windows.shape[3] * windows.shape[4])


def _parts(maps: Array) -> Iterator[tuple[slice, slice]]:
    """Parts of maps with about ``ROWS`` rows or more: rows of one map, or several whole maps."""
    n, height, width, _ = maps.shape
    if height * width < ROWS:
        step = -(-ROWS // (height * width))
        yield from ((slice(start, start + step), slice(None)) for start in range(0, n, step))
        return
    step = -(-ROWS // width)
    for image, top in itertools.product(range(n), range(0, height, step)):
        yield slice(image, image + 1), slice(top, top + step)


class Statistics(NamedTuple):
    """What ``centre`` finds.

    Attributes:
        inverse: (R, C), 1 / standard deviation.
        moments: (2, C), mean and unbiased variance of the first rank.
        number: of the values of a channel.
    """

    inverse: Array
    moments: Array
    number: float


@quiet
def centre(x: Array, ranks: int, eps: float, total: Total = alone) -> Statistics:
    """Subtracts the means of each virtual rank, in place.

    Args:
        x: (N, H, W, C).
        ranks: number of virtual ranks.
        total: what other processes add to the statistics.
    """
    rows = _by_rank(x, ranks)
    own = _summed(rows, 1, lambda at, sums: _add_up(rows[at], out=sums))
    (whole,), count = total(own, rows.shape[1])
    mean = whole / count
    offset = mean.astype(x.dtype)

    def subtract(at: Place, sums: Array) -> None:
        block = rows[at]
        block -= offset[at[0]]
        np.einsum("mc,mc->c", block, block, out=sums[0])

    (square,), count = total(_summed(rows, 1, subtract), rows.shape[1])
    inverse = 1.0 / np.sqrt(square / count + eps)
    moments = np.stack([mean[0], square[0] / (count - 1)])
    return Statistics(inverse.astype(x.dtype), moments.astype(x.dtype), count)


@quiet
def scale(
    centred: Array,
    inverse: Array,
    affine: tuple[Array, Array],
    *,
    other: Array | None = None,
    relu: bool = True,
    out: Array | None = None,
) -> Array:
    """The rest of a batch norm, plus another map, and ReLU.

    Args:
        centred: (N, H, W, C), as ``centre`` leaves it.
        inverse: (R, C).
        affine: (C,) and (C,), gain and shift.
        other: as ``centred``.
        out: where to write the result, e.g. ``centred`` itself.
    """
    y = np.empty_like(centred) if out is None else out
    gain, shift = affine
    factor = gain * inverse
    given, found = (_by_rank(each, len(inverse)) for each in (centred, y))
    added = None if other is None else _by_rank(other, len(inverse))

    def compute(at: Place) -> None:
        block = found[at]
        np.multiply(given[at], factor[at[0]], out=block)
        block += shift
        if added is not None:
            block += added[at]
        if relu:
            np.maximum(block, 0, out=block)

    _each_block(found, compute)
    return y


@quiet
def normalize_backward(
    centred: Array,
    inverse: Array,
    gain: Array,
    y: Array | None,
    grad: Array,
    total: Total = alone,
) -> tuple[Array, Array]:
    """Turns ``centred`` into the gradient of the map that ``centre`` has changed.

    Args:
        centred: (N, H, W, C), as ``centre`` left it.
        inverse: (R, C).
        gain: (C,).
        y: as ``centred``, the result of ``scale`` if it went through ReLU.
        grad: of the result. It becomes the gradient before ReLU, which is also that of ``other``.
        total: as in ``centre``.

    Returns:
        The part of this process in the gradients of gain and shift, (C,) and (C,).
    """
    own, given = (_by_rank(each, len(inverse)) for each in (centred, grad))
    after = None if y is None else _by_rank(y, len(inverse))

    def add_up(at: Place, sums: Array) -> None:
        block = given[at]
        if after is not None:
            block *= after[at] > 0
        _add_up(block, out=sums[:1])
        np.einsum("mc,mc->c", block, own[at], out=sums[1])

    sums = _summed(given, 2, add_up)
    sums[1] *= inverse
    (whole, along), count = total(sums, given.shape[1])
    terms = along * inverse / -count, whole / count, gain * inverse
    slope, offset, factor = (term.astype(grad.dtype) for term in terms)

    def differentiate(at: Place) -> None:
        rank, block = at[0], own[at]
        block *= slope[rank]
        block += given[at]
        block -= offset[rank]
        block *= factor[rank]

    _each_block(own, differentiate)
    of_shift, of_gain = sums.sum(1).astype(grad.dtype)
    return of_gain, of_shift


@quiet
def mean(x: Array) -> Array:
    """The mean over positions. (N, H, W, C) -> (N, C)."""
    n, height, width, channels = x.shape
    share = np.full((1, height * width), 1.0 / (height * width), x.dtype)
    return np.matmul(share, x.reshape(n, -1, channels))[:, 0]


@quiet
def mean_backward(grad: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of ``mean`` with respect to a map of a shape. grad: (N, C)."""
    _, height, width, _ = shape
    share = grad * grad.dtype.type(1.0 / (height * width))
    return np.broadcast_to(share[:, None, None], shape).copy()


def _by_rank(x: Array, ranks: int) -> Array:
    """(N, H, W, C) -> (R, M, C), without a copy: NumPy refuses the shape if that takes one."""
    n, height, width, channels = x.shape
    rows = x.view()
    rows.shape = ranks, n // ranks * height * width, channels
    return rows


def _add_up(block: Array, *, out: Array) -> None:
    """Sums of columns. (M, C) -> (1, C)."""
    np.matmul(np.ones((1, len(block)), block.dtype), block, out=out)


def _each_block(x: Array, compute: Callable[[Place], None]) -> None:
    """Calls a function with the place of each block of (R, M, C)."""
    places = _places(x)
    threads.each(lambda part: compute(places[part.start]), len(places), 1)


def _summed(x: Array, number: int, compute: Callable[[Place, Array], None]) -> Array:
    """Sums over the rows of each rank in float64, of sums over blocks in the type of x.

    Args:
        x: (R, M, C).
        number: of sums.
        compute: gets the place of a block, and (number, C), where it writes the sums of the block.

    Returns:
        (number, R, C).
    """
    places = _places(x)
    sums = np.empty((len(places), number, x.shape[2]), x.dtype)
    threads.each(lambda part: compute(places[part.start], sums[part.start]), len(places), 1)
    of_ranks = sums.reshape(len(x), -1, *sums.shape[1:]).sum(1, dtype=np.float64)
    return of_ranks.swapaxes(0, 1)


def _places(x: Array) -> list[Place]:
    """Blocks of (R, M, C) that stay in the cache."""
    ranks, rows, channels = x.shape
    step = min(TERMS, max(1, BLOCK // channels))
    starts = range(0, rows, step)
    return [(rank, slice(start, start + step)) for rank in range(ranks) for start in starts]
