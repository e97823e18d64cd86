"""Layers whose built-in form is slow or inexact on OneFlow's CPU, written from its own operations.

Sums are matrix products with ones and repetitions products of rank one: the kernels for sums and
for broadcasting a column are 10 to 500 times slower. Hyper-parameters are operands, since the
attributes of a kernel are rounded to float32. A ``Function`` keeps only saved tensors: any other
attribute of its context ends in a crash.

Shape letters: N rows or images, D columns, C channels, P positions of a map.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache

import numpy as np
import oneflow as flow
import oneflow.nn.functional as F
from oneflow import Tensor, nn

from triptych.backends.oneflow import kernels

Linear = nn.Linear

_numpy_forms = True


@contextmanager
def numpy_forms(enabled: bool) -> Iterator[None]:
    """Whether ``kernels`` compute where they are faster than OneFlow's own: on the CPU."""
    global _numpy_forms
    before, _numpy_forms = _numpy_forms, enabled
    try:
        yield
    finally:
        _numpy_forms = before


def in_numpy(x: Tensor) -> bool:
    """Whether ``kernels`` compute, and not OneFlow's own."""
    return _numpy_forms and not x.is_cuda


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


def row_sum(x: Tensor) -> Tensor:
    """(N, D) -> (N, 1)."""
    return flow.matmul(x, _constant(x.shape[1], 1, 1.0, x.dtype, x.device))


def repeat(x: Tensor, columns: int) -> Tensor:
    """(N, 1) -> (N, columns), exactly."""
    return flow.matmul(x, _constant(1, columns, 1.0, x.dtype, x.device))


def unit_rows(x: Tensor, eps: float) -> Tensor:
    """x / max(|x|, eps). (N, D)."""
    # F.normalize bounds the squared norm by eps, in float32: rows near zero get wrong gradients.
    norm = row_sum(x * x).clamp(min=eps * eps).sqrt()
    return x * repeat(1.0 / norm, x.shape[1])


def channel_sum(x: Tensor) -> Tensor:
    """(N, C, P, 1) -> (1, C, 1, 1)."""
    n, channels, positions, _ = x.shape
    rows = x.reshape(-1, positions)
    rows = rows if positions == 1 else row_sum(rows)
    return column_sum(rows.reshape(n, channels)).reshape(1, channels, 1, 1)


def _centred(x: Tensor) -> Tensor:
    return x - repeat(row_mean(x), x.shape[1])


def pick_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """result[n, i] = x[n, ids[n, i]], and x[0, ids[n, i]] where x has one image only.

    Args:
        x: (N, L, D) or (1, L, D).
        ids: (N, T) int64.
    """
    n, length, width = x.shape
    rows = ids
    if n > 1:
        # The kernel for gathering along the second axis wants an index of the size of the result.
        rows = ids + (flow.arange(n, device=ids.device) * length).reshape(n, 1)
    picked = x.reshape(-1, width).index_select(0, rows.reshape(-1))
    return picked.reshape(*ids.shape, width)


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


class _NormalizeChannels(flow.autograd.Function):
    """weight * centred * inverse + bias, as a function of the x it was made from. (N, C, P, 1).

    With three dimensions the kernels would repeat a channel's value a hundred times as slowly.
    """

    @staticmethod
    def forward(
        ctx: object, x: Tensor, centred: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        normal = centred * inverse
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        normal, inverse, weight = ctx.saved_tensors
        count = grad.numel() / grad.shape[1]
        along, whole = channel_sum(grad * normal), channel_sum(grad)
        factor = weight.reshape(1, -1, 1, 1) * inverse
        grad_x = (grad - whole / count - normal * (along / count)) * factor
        return grad_x, None, None, along.reshape(-1), whole.reshape(-1)


class _NormalizeInNumpy(flow.autograd.Function):
    """y as a function of the x it was made from, (R, N, C, P); see ``kernels.normalize``."""

    @staticmethod
    def forward(
        ctx: object,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        y: Tensor,
        centred: Tensor,
        factors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(centred, factors)
        return y

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred, factors = (tensor.numpy() for tensor in ctx.saved_tensors)
        found = kernels.normalize_backward(centred, factors, grad.numpy())
        return *(flow.from_numpy(array) for array in found), None, None, None


class BatchNorm(nn.Module):
    """Batch norm over all axes but the second; the running variance is the unbiased one.

    The built-in one takes the variance as E[x^2] - E[x]^2, which loses the digits of a mean, and
    rounds eps and momentum to float32. In training each of ``virtual_ranks`` contiguous parts of
    the batch is normalised by itself; the running statistics are those of the first part.
    """

    virtual_ranks = 1

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
        """(N, C, ...), of the same shape.

        Raises:
            ValueError: one value per channel in training mode, which has no variance.
        """
        if not self.training:
            return self._evaluate(x)
        n, width = x.shape[:2]
        ranks = self.virtual_ranks
        if x.numel() == width * ranks:
            raise ValueError("batch norm: expected at least 2 values per channel, got 1")
        parts = x.reshape(ranks, n // ranks, width, -1)
        if x.ndim > 2 and in_numpy(x):
            return self._normalize_in_numpy(parts).reshape(*x.shape)
        # The parts of the batch become further channels.
        channels = parts.transpose(0, 1) if ranks > 1 else parts
        y = self._normalize(channels.reshape(n // ranks, ranks * width, -1, 1))
        if ranks > 1:
            y = y.reshape(n // ranks, ranks, width, -1).transpose(0, 1)
        return y.reshape(*x.shape)

    def _normalize(self, x: Tensor) -> Tensor:
        """(N, C, P, 1)."""
        count = x.numel() // x.shape[1]
        with flow.no_grad():
            mean = channel_sum(x) / count
            centred = x - mean
            square = channel_sum(centred * centred)
            self._track(mean.reshape(-1), (square / (count - 1)).reshape(-1))
            inverse = (square / count + self.eps).rsqrt()
        weight, bias = (flow.cat([tensor] * self.virtual_ranks) for tensor in self._affine())
        return _NormalizeChannels.apply(x, centred, inverse, weight, bias)

    def _normalize_in_numpy(self, x: Tensor) -> Tensor:
        """(R, N, C, P)."""
        weight, bias = self._affine()
        # One array, since each wait for OneFlow's queue costs as much as many additions.
        with flow.no_grad():
            affine = flow.stack([weight, bias]).numpy()
        keep = flow.is_grad_enabled()
        y, centred, inverse, statistics = kernels.normalize(x.numpy(), affine, self.eps, keep=keep)
        self._track(*flow.from_numpy(statistics))
        if not keep:
            return flow.from_numpy(y)
        y, centred, factors = map(flow.from_numpy, (y, centred, np.vstack([affine[:1], inverse])))
        return _NormalizeInNumpy.apply(x, weight, bias, y, centred, factors)

    def _evaluate(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        inverse = (self.running_var + self.eps).rsqrt().reshape(*shape)
        weight, bias = (tensor.reshape(*shape) for tensor in self._affine())
        return (x - self.running_mean.reshape(*shape)) * inverse * weight + bias

    def _affine(self) -> tuple[Tensor, Tensor]:
        if self.weight is not None:
            return self.weight, self.bias
        like = self.running_mean
        return tuple(
            _constant(1, len(like), value, like.dtype, like.device).reshape(-1)
            for value in (1.0, 0.0)
        )

    @flow.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        width, keep = len(self.running_mean), 1.0 - self.momentum
        self.running_mean.mul_(keep).add_(mean[:width], alpha=self.momentum)
        self.running_var.mul_(keep).add_(variance[:width], alpha=self.momentum)
        self.num_batches_tracked.add_(1)


def set_virtual_ranks(model: nn.Module, count: int) -> None:
    """Tells every batch norm inside how many parts a batch has."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.virtual_ranks = count


class _GeluFloat32(flow.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        y, dy = kernels.gelu(x.numpy(), slope=True)
        ctx.save_for_backward(flow.from_numpy(dy))
        return flow.from_numpy(y)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class Gelu(nn.Module):
    """x Phi(x), with the exact normal distribution Phi."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if x.dtype != flow.float32 or not in_numpy(x):
            return F.gelu(x)
        if flow.is_grad_enabled() and x.requires_grad:
            return _GeluFloat32.apply(x)
        return flow.from_numpy(kernels.gelu(x.numpy(), slope=False)[0])


@cache
def _convolution(stride: int, padding: int, of_x: bool) -> type[flow.autograd.Function]:
    """The convolution of x and weight. of_x: whether x gets a gradient, too."""

    class Convolution(flow.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return flow.from_numpy(kernels.convolve(x.numpy(), weight.numpy(), stride, padding))

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, Tensor]:
            x, weight = (saved.numpy() for saved in ctx.saved_tensors)
            grad_x, grad_weight = kernels.convolve_backward(
                x, weight, grad.numpy(), stride, padding, of_x=of_x
            )
            return flow.from_numpy(grad_x) if of_x else None, flow.from_numpy(grad_weight)

    return Convolution


class Conv2d(nn.Conv2d):
    """OneFlow's, square, with faster ways to compute it on the CPU. (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, O, height, width)."""
        y = self._convolve(x, self.kernel_size[0], self.stride[0], self.padding[0])
        return y if self.bias is None else y + self.bias.reshape(1, -1, 1, 1)

    def _convolve(self, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
        weight = self.weight
        if in_numpy(x):
            if not flow.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
                y = kernels.convolve(x.numpy(), weight.numpy(), stride, padding)
                return flow.from_numpy(y)
            return _convolution(stride, padding, x.requires_grad).apply(x, weight)
        if kernel == stride == 1:
            n, channels, height, width = x.shape
            product = flow.matmul(weight.reshape(-1, channels), x.reshape(n, channels, -1))
            return product.reshape(n, -1, height, width)
        return F.conv2d(x, weight, None, stride, padding)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each mapped linearly. (N, C, H, W) -> (N, L, D).

    The convolution is its matrix product: the kernel is twice as slow. ``proj`` may also be a
    whole stem, which then maps images to (N, D, rows, columns).
    """

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Patches in row-major order."""
        if isinstance(self.proj, nn.Sequential):
            return self.proj(images).flatten(2).transpose(1, 2)
        weight = self.proj.weight
        n, c, height, width = images.shape
        p = weight.shape[-1]
        patches = images.reshape(n, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(n, -1, c * p * p)
        return F.linear(patches, weight.reshape(weight.shape[0], -1), self.proj.bias)
