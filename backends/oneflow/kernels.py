"""Functions in NumPy that are faster than OneFlow's CPU kernels. They read the memory of tensors.

No function changes its input. Non-finite values give no warning here; they show in the loss.

Shape letters: N images or rows, C and O channels, K side of a kernel, P positions, T tokens,
D and O columns.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from triptych.backends.oneflow import threads
from triptych.core.contracts import Array

# Coefficients of atanh(erf(x / sqrt 2)) / x as a polynomial in x^2. The normal distribution made
# from it has an error of at most 3e-8.
_TANH_FORM = (
    0.7978849414847404,
    0.03633308441989718,
    -3.259474880745478e-05,
    -5.53063177518842e-05,
    3.964773795707766e-06,
    -1.3226636592469782e-07,
    1.756280874378105e-09,
)
BLOCK = 32768  # values per block, so that the arrays of a block stay in the cache
COLUMNS = 512  # least number of positions in a matrix product


quiet = np.errstate(all="ignore")


@quiet
def gelu(x: Array, *, slope: bool) -> tuple[Array, Array | None]:
    """x Phi(x), exact but for rounding, and optionally the derivative Phi(x) + x phi(x).

    OneFlow's kernel takes 10 ns per value. After a matrix product it takes three times as long:
    the AVX code of the product leaves the processor in a state that slows down plain SSE code.

    Args:
        x: float32, any shape.
        slope: whether to compute the derivative.
    """
    flat = x.reshape(-1)
    y, dy = np.empty_like(flat), np.empty_like(flat) if slope else None

    def compute(part: slice) -> None:
        block = flat[part]
        square, phi, cdf = np.empty((3, block.size), np.float32)
        np.multiply(block, block, out=square)
        _normal_cdf(block, square, out=cdf)
        np.multiply(block, cdf, out=y[part])
        if dy is not None:
            np.multiply(square, np.float32(-0.5), out=phi)
            np.exp(phi, out=phi)
            phi *= np.float32(1.0 / np.sqrt(2.0 * np.pi))
            phi *= block
            np.add(cdf, phi, out=dy[part])

    threads.each(compute, flat.size, BLOCK)
    return y.reshape(x.shape), None if dy is None else dy.reshape(x.shape)


def _normal_cdf(x: Array, square: Array, *, out: Array) -> None:
    first, *middle, last = (np.float32(c) for c in _TANH_FORM)
    np.multiply(square, last, out=out)
    for coefficient in reversed(middle):
        out += coefficient
        out *= square
    out += first
    out *= x
    np.tanh(out, out=out)
    out *= np.float32(0.5)
    out += np.float32(0.5)


@quiet
def convolve(x: Array, weight: Array, stride: int, padding: int) -> Array:
    """A convolution, computed as matrix products of a few images each.

    Args:
        x: (N, C, H, W).
        weight: (O, C, K, K).

    Returns:
        (N, O, height, width).
    """
    fan_out, _, kernel, _ = weight.shape
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in x.shape[2:])
    y = np.empty((len(x), fan_out, height * width), x.dtype)
    for images in _groups(len(x), height * width):
        columns = _columns(x[images], kernel, stride, padding, (height, width))
        product = weight.reshape(fan_out, -1) @ columns
        y[images] = product.reshape(fan_out, -1, height * width).swapaxes(0, 1)
    return y.reshape(len(x), fan_out, height, width)


@quiet
def convolve_backward(
    x: Array, weight: Array, grad: Array, stride: int, padding: int, *, of_x: bool
) -> tuple[Array | None, Array]:
    """The gradients of ``convolve`` with respect to x, if ``of_x`` is set, and to weight.

    The columns are computed again. Kept from the forward pass, they would take the memory of K * K
    inputs.

    Args:
        grad: (N, O, height, width).
    """
    fan_out, _, kernel, _ = weight.shape
    size = grad.shape[2], grad.shape[3]
    flat = weight.reshape(fan_out, -1)
    grad_weight = np.zeros_like(flat)
    grad_x = np.empty_like(x) if of_x else None
    for images in _groups(len(x), size[0] * size[1]):
        columns = _columns(x[images], kernel, stride, padding, size)
        part = grad[images].swapaxes(0, 1).reshape(fan_out, -1)
        grad_weight += part @ columns.T
        if grad_x is not None:
            padded = _padded(np.zeros_like(x[images]), padding)
            _add_columns(flat.T @ part, padded, kernel, stride, size)
            rows, row = (slice(padding, padding + side) for side in x.shape[2:])
            grad_x[images] = padded[:, :, rows, row]
    return grad_x, grad_weight.reshape(weight.shape)


def _groups(images: int, positions: int) -> Iterator[slice]:
    """Slices of the images. The product of a slice has about ``COLUMNS`` columns or more."""
    step = -(-COLUMNS // positions)
    return (slice(start, start + step) for start in range(0, images, step))


def _padded(x: Array, padding: int) -> Array:
    n, channels, height, width = x.shape
    padded = np.zeros((n, channels, height + 2 * padding, width + 2 * padding), x.dtype)
    padded[:, :, padding : padding + height, padding : padding + width] = x
    return padded


def _columns(x: Array, kernel: int, stride: int, padding: int, size: tuple[int, int]) -> Array:
    """The inputs of each output position. (N, C, H, W) -> (C * K * K, N * P)."""
    n, channels = x.shape[:2]
    if kernel == stride == n == 1:
        return x.reshape(channels, -1)
    columns = np.empty((channels, kernel, kernel, n, *size), x.dtype)
    padded = _padded(x, padding) if padding else x
    for (i, j), inputs in _taps(padded, kernel, stride, size):
        columns[:, i, j] = inputs.swapaxes(0, 1)
    return columns.reshape(channels * kernel * kernel, -1)


def _add_columns(
    columns: Array, padded: Array, kernel: int, stride: int, size: tuple[int, int]
) -> None:
    """The reverse of ``_columns``: adds each value to the position that it was taken from."""
    n, channels = padded.shape[:2]
    columns = columns.reshape(channels, kernel, kernel, n, *size)
    for (i, j), inputs in _taps(padded, kernel, stride, size):
        inputs += columns[:, i, j].swapaxes(0, 1)


def _taps(
    padded: Array, kernel: int, stride: int, size: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], Array]]:
    """Each position in a kernel, with a view of its inputs, (N, C, height, width)."""
    height, width = size
    for i, j in itertools.product(range(kernel), repeat=2):
        rows, columns = slice(i, i + stride * height, stride), slice(j, j + stride * width, stride)
        yield (i, j), padded[:, :, rows, columns]


def as_rows(x: Array) -> Array:
    """(..., D) -> (N, D)."""
    return x.reshape(-1, x.shape[-1])


@quiet
def mapped(x: Array, weight: Array, *terms: Array) -> Array:
    """A linear map of rows, plus terms. (..., D), (O, D), each (O,) or (N, O) -> (..., O)."""
    y = as_rows(x) @ weight.T
    for term in terms:
        y += term
    return y.reshape(*x.shape[:-1], len(weight))


@quiet
def from_outputs(grad: Array, weight: Array, factor: Array | None = None) -> Array:
    """The gradient of the rows that were mapped, times a factor. (N, O), (O, D) -> (N, D)."""
    found: Array = grad @ weight
    if factor is not None:
        found *= factor
    return found


@quiet
def of_weights(grad: Array, rows: Array) -> tuple[Array, Array]:
    """The gradients of weight and bias. (N, O), (N, D) -> (O, D), (O,)."""
    return grad.T @ rows, (np.ones((1, len(grad)), grad.dtype) @ grad)[0]


@quiet
def attend(qkv: Array, heads: int) -> tuple[Array, Array]:
    """Softmax attention of all tokens to all tokens.

    Args:
        qkv: (N, T, 3 D), queries, keys and values of all heads.

    Returns:
        The mixed values (N, T, D), and the weights (N, heads, T, T), whose rows sum to 1.
    """
    query, key, value = _by_head(qkv, heads)
    weights = np.matmul(query, key.swapaxes(-1, -2))
    scale = weights.dtype.type(query.shape[-1] ** -0.5)

    def softmax(part: slice) -> None:
        block = weights[part]
        block *= scale
        block -= block.max(-1, keepdims=True)
        np.exp(block, out=block)
        block /= block.sum(-1, keepdims=True)

    threads.each(softmax, len(weights), 1)
    mixed = np.empty((*qkv.shape[:2], qkv.shape[2] // 3), qkv.dtype)
    np.matmul(weights, value, out=_by_head(mixed, heads, 1)[0])
    return mixed, weights


@quiet
def attend_backward(qkv: Array, weights: Array, grad: Array) -> Array:
    """The gradient of ``attend`` with respect to qkv. grad: (N, T, D)."""
    heads = weights.shape[1]
    query, key, value = _by_head(qkv, heads)
    (given,) = _by_head(grad, heads, 1)
    of_qkv = np.empty_like(qkv)
    of_query, of_key, of_value = _by_head(of_qkv, heads)
    np.matmul(weights.swapaxes(-1, -2), given, out=of_value)
    scores = np.matmul(given, value.swapaxes(-1, -2))
    scale = weights.dtype.type(query.shape[-1] ** -0.5)

    def differentiate(part: slice) -> None:
        block, share = scores[part], weights[part]
        block -= np.einsum("nhst,nhst->nhs", block, share)[..., None]
        block *= share
        block *= scale

    threads.each(differentiate, len(weights), 1)
    np.matmul(scores, key, out=of_query)
    np.matmul(scores.swapaxes(-1, -2), query, out=of_key)
    return of_qkv


def _by_head(x: Array, heads: int, parts: int = 3) -> Array:
    """(N, T, parts * D) -> (parts, N, heads, T, D / heads), without a copy."""
    n, length, width = x.shape
    split = x.reshape(n, length, parts, heads, width // (parts * heads))
    return split.transpose(2, 0, 3, 1, 4)


@quiet
def normalize_rows(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Array, Array]:
    """Layer norm: y, the normalised rows, and what they were multiplied by. (N, D)."""
    y, normal = np.empty_like(x), np.empty_like(x)
    inverse = np.empty((len(x), 1), x.dtype)

    def compute(rows: slice) -> None:
        centred, factor = normal[rows], inverse[rows]
        np.subtract(x[rows], x[rows].mean(1, keepdims=True), out=centred)
        variance = np.einsum("nd,nd->n", centred, centred)[:, None] / x.shape[1]
        np.divide(1.0, np.sqrt(variance + x.dtype.type(eps)), out=factor)
        centred *= factor
        np.multiply(centred, weight, out=y[rows])
        y[rows] += bias

    threads.each(compute, len(x), _rows_of_block(x))
    return y, normal, inverse


@quiet
def normalize_rows_backward(
    normal: Array, inverse: Array, weight: Array, grad: Array, *terms: Array
) -> tuple[Array, Array, Array]:
    """The gradients of ``normalize_rows`` with respect to x, plus terms, and to weight and bias."""
    of_x, width = np.empty_like(normal), normal.shape[1]
    step = _rows_of_block(normal)
    sums = np.empty((-(-len(normal) // step), 2, width), normal.dtype)

    def compute(rows: slice) -> None:
        given, own, out = grad[rows], normal[rows], of_x[rows]
        of_weight, of_bias = sums[rows.start // step]
        np.einsum("nd,nd->d", given, own, out=of_weight)
        given.sum(0, out=of_bias)
        np.multiply(given, weight, out=out)
        along = np.einsum("nd,nd->n", out, own)[:, None] / width
        out -= out.mean(1, keepdims=True)
        out -= own * along
        out *= inverse[rows]
        for term in terms:
            out += term[rows]

    threads.each(compute, len(normal), step)
    of_weight, of_bias = np.zeros((2, width), normal.dtype)
    for one in sums:
        of_weight += one[0]
        of_bias += one[1]
    return of_x, of_weight, of_bias


def _rows_of_block(x: Array) -> int:
    """Number of rows that stay in the cache."""
    return max(1, BLOCK // x.shape[1])


@quiet
def adamw(
    value: Array,
    gradient: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    keep: float,
    betas: tuple[float, float],
    rate: float,
    correction: float,
    eps: float,
) -> None:
    """AdamW, in place: the value, which is multiplied by ``keep`` before, and the moments.

    Args:
        rate: learning rate, with the correction of the first moment.
        correction: that of the root of the second moment.
    """

    def update(part: slice) -> None:
        x, g, mean, square = (a[part] for a in (value, gradient, exp_avg, exp_avg_sq))
        step, scale = np.empty((2, len(x)), x.dtype)
        x *= kind(keep)
        mean *= kind(betas[0])
        mean += np.multiply(g, kind(1.0 - betas[0]), out=step)
        square *= kind(betas[1])
        np.multiply(g, g, out=step)
        step *= kind(1.0 - betas[1])
        square += step
        np.sqrt(square, out=scale)
        scale /= kind(correction)
        scale += kind(eps)
        x -= np.divide(np.multiply(mean, kind(rate), out=step), scale, out=step)

    kind = value.dtype.type
    threads.each(update, len(value), BLOCK)
