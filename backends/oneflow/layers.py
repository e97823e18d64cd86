"""Layers whose built-in form is slow or inexact on OneFlow's CPU, written from its own operations.

Sums are matrix products with ones and repetitions products of rank one: the kernels for sums and
for broadcasting a column are 10 to 500 times slower. Hyper-parameters are operands, since the
attributes of a kernel are rounded to float32. A ``Function`` keeps only saved tensors: any other
attribute of its context ends in a crash.

Shape letters: N rows, D columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import oneflow as flow
import oneflow.nn.functional as F
from oneflow import Tensor, nn

from triptych.core.engine import Array

Linear = nn.Linear

_numpy_forms = True


@contextmanager
def numpy_forms(enabled: bool) -> Iterator[None]:
    """Whether NumPy computes in the tensors' memory where it is faster: on the CPU, in float32."""
    global _numpy_forms
    before, _numpy_forms = _numpy_forms, enabled
    try:
        yield
    finally:
        _numpy_forms = before


@lru_cache(maxsize=128)
def _constant(
    rows: int, columns: int, value: float, dtype: flow.dtype, device: flow.device
) -> Tensor:
    return flow.full((rows, columns), value, dtype=dtype, device=device)


def row_mean(x: Tensor) -> Tensor:
    """(N, D) -> (N, 1)."""
    width = x.shape[1]
    return flow.matmul(x, _constant(width, 1, 1.0 / width, x.dtype, x.device))


def column_sum(x: Tensor) -> Tensor:
    """(N, D) -> (1, D)."""
    return flow.matmul(_constant(1, x.shape[0], 1.0, x.dtype, x.device), x)


def repeat(x: Tensor, columns: int) -> Tensor:
    """(N, 1) -> (N, columns), exactly."""
    return flow.matmul(x, _constant(1, columns, 1.0, x.dtype, x.device))


def _centred(x: Tensor) -> Tensor:
    return x - repeat(row_mean(x), x.shape[1])


class _NormalizeRows(flow.autograd.Function):
    """weight * centred * inverse + bias, as a function of the x it was made from."""

    @staticmethod
    def forward(
        ctx: object, x: Tensor, centred: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        normal = centred * repeat(inverse, centred.shape[1])
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight + bias

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        normal, inverse, weight = ctx.saved_tensors
        width = normal.shape[1]
        inner = grad * normal
        along = repeat(flow.matmul(inner, (weight / width).reshape(width, 1)), width)
        grad_x = (_centred(grad * weight) - normal * along) * repeat(inverse, width)
        return grad_x, None, None, column_sum(inner).reshape(width), column_sum(grad).reshape(width)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, two passes."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(flow.ones(width))
        self.bias = nn.Parameter(flow.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        rows = x.reshape(-1, x.shape[-1])
        with flow.no_grad():
            centred = _centred(rows)
            inverse = (row_mean(centred * centred) + self.eps).rsqrt()
        y = _NormalizeRows.apply(rows, centred, inverse, self.weight, self.bias)
        return y.reshape(*x.shape)


class _NormalizeColumns(flow.autograd.Function):
    """weight * centred * inverse + bias, as a function of the x it was made from."""

    @staticmethod
    def forward(
        ctx: object, x: Tensor, centred: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        normal = centred * inverse
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight + bias

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        normal, inverse, weight = ctx.saved_tensors
        n, width = normal.shape
        grad_weight, grad_bias = column_sum(grad * normal), column_sum(grad)
        grad_x = (grad - grad_bias / n - normal * (grad_weight / n)) * (weight * inverse)
        return grad_x, None, None, grad_weight.reshape(width), grad_bias.reshape(width)


class BatchNorm(nn.Module):
    """Batch norm of rows of features, two passes; the running variance is the unbiased one.

    The built-in one takes the variance as E[x^2] - E[x]^2, which loses the digits of a mean.
    """

    def __init__(
        self, width: int, *, affine: bool = True, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(flow.ones(width)) if affine else None
        self.bias = nn.Parameter(flow.zeros(width)) if affine else None
        self.register_buffer("running_mean", flow.zeros(width))
        self.register_buffer("running_var", flow.ones(width))
        self.register_buffer("num_batches_tracked", flow.tensor(0, dtype=flow.int64))

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D).

        Raises:
            ValueError: one row in training mode, which has no variance.
        """
        n, width = x.shape
        if self.training and n < 2:
            raise ValueError("batch norm: expected at least 2 rows in training mode, got 1")
        with flow.no_grad():
            if self.training:
                mean = column_sum(x) / n
                centred = x - mean
                square = column_sum(centred * centred)
                self._track(mean.reshape(width), (square / (n - 1)).reshape(width))
                inverse = (square / n + self.eps).rsqrt()
            else:
                inverse = (self.running_var + self.eps).rsqrt().reshape(1, width)
        affine = self.weight is not None
        weight = self.weight if affine else _constant(1, width, 1.0, x.dtype, x.device)
        bias = self.bias if affine else _constant(1, width, 0.0, x.dtype, x.device)
        if self.training:
            return _NormalizeColumns.apply(x, centred, inverse, weight, bias)
        return (x - self.running_mean) * inverse * weight + bias

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        keep = 1.0 - self.momentum
        self.running_mean.mul_(keep).add_(mean, alpha=self.momentum)
        self.running_var.mul_(keep).add_(variance, alpha=self.momentum)
        self.num_batches_tracked.add_(1)


# atanh(erf(x / sqrt 2)) / x as a polynomial in x^2: the normal distribution within 3e-8.
_TANH_FORM = (
    0.7978849414847404,
    0.03633308441989718,
    -3.259474880745478e-05,
    -5.53063177518842e-05,
    3.964773795707766e-06,
    -1.3226636592469782e-07,
    1.756280874378105e-09,
)
_BLOCK = 32768  # values: what is worked on stays in the cache


def gelu_float32(x: Array, *, slope: bool) -> tuple[Array, Array | None]:
    """x Phi(x), exact but for rounding, and where asked its derivative Phi(x) + x phi(x).

    OneFlow's kernel takes 10 ns a value, and three times as much after a matrix product, whose
    AVX code leaves the processor in a state that slows plain SSE code down.

    Args:
        x: float32.
    """
    flat = x.reshape(-1)
    y, dy = np.empty_like(flat), np.empty_like(flat) if slope else None
    scratch = np.empty((3, min(_BLOCK, flat.size)), np.float32)
    with np.errstate(all="ignore"):  # what is not finite shows in the loss
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            square, phi, cdf = scratch[:, : block.size]
            np.multiply(block, block, out=square)
            _normal_cdf(block, square, out=cdf)
            np.multiply(block, cdf, out=y[start : start + _BLOCK])
            if dy is not None:
                np.multiply(square, np.float32(-0.5), out=phi)
                np.exp(phi, out=phi)
                phi *= np.float32(1.0 / np.sqrt(2.0 * np.pi))
                phi *= block
                np.add(cdf, phi, out=dy[start : start + _BLOCK])
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


class _GeluFloat32(flow.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        y, dy = gelu_float32(x.numpy(), slope=True)
        ctx.save_for_backward(flow.from_numpy(dy))
        return flow.from_numpy(y)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class Gelu(nn.Module):
    """x Phi(x), with the exact normal distribution Phi."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if not _numpy_forms or x.dtype != flow.float32 or x.is_cuda:
            return F.gelu(x)
        if flow.is_grad_enabled() and x.requires_grad:
            return _GeluFloat32.apply(x)
        return flow.from_numpy(gelu_float32(x.numpy(), slope=False)[0])


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each mapped linearly. (N, C, H, W) -> (N, L, D).

    The convolution is its matrix product: the kernel is twice as slow.
    """

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Patches in row-major order."""
        weight = self.proj.weight
        n, c, height, width = images.shape
        p = weight.shape[-1]
        patches = images.reshape(n, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(n, -1, c * p * p)
        return F.linear(patches, weight.reshape(weight.shape[0], -1), self.proj.bias)
