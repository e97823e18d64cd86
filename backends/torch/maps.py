"""Layers for float32 maps on the CPU whose channels are neighbours in memory ("channels last").

PyTorch's convolutions are faster there, and a 1x1 convolution is a matrix product. But its batch
norm adds up all positions of a channel one by one, which loses two digits: here it adds up parts.

Shape letters: N images, C and D channels, P positions of all images, F positions that are folded.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def serve(x: Tensor) -> bool:
    """Whether the layers of this module are for ``x``, of any shape."""
    # Networks in 16 bits keep PyTorch's layers. float64 is here for tests: runs in float64 have no
    # maps with channels last, for their bits. A compiler makes kernels of its own.
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.dtype in (torch.float32, torch.float64)
        and x.ndim == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


class Conv2d(nn.Conv2d):
    """PyTorch's convolution without a bias. If it is 1x1, it is computed as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D, H', W')."""
        if self.kernel_size != (1, 1) or not serve(x):
            return super().forward(x)
        if self.stride != (1, 1):
            # A slice in two dimensions would have a gradient of two zero-filled maps.
            x = F.avg_pool2d(x, 1, self.stride)
        return F.linear(x.movedim(1, -1), self.weight.flatten(1)).movedim(-1, 1)


class BatchNorm(torch.autograd.Function):
    """Batch norm of contiguous parts of the images by the statistics of each part.

    The passes over the maps are the kernels of a batch norm with given statistics. The gradient of
    the maps is the sum of two parts: one through the normalised maps, one through the statistics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        moments: list[tuple[Tensor, Tensor]],
        eps: float,
    ) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W).

        Args:
            moments: mean and biased variance of the channels of each part, each (C,).
        """
        ctx.save_for_backward(x, weight, *(m for pair in moments for m in pair))
        ctx.eps = eps
        y = torch.empty_like(x)
        for part, out, (mean, variance) in zip(*_chunks(len(moments), x, y), moments, strict=True):
            _normalise(part, (weight, bias), mean, variance, eps, out)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of maps, weight and bias."""
        x, weight, *moments = ctx.saved_tensors
        means, variances = moments[::2], moments[1::2]
        of_x = torch.empty_like(x)
        of_parameters = torch.zeros(2, len(weight), dtype=x.dtype)
        parts = _chunks(len(means), x, gradients[0], of_x)
        for part, grad, out, mean, variance in zip(*parts, means, variances, strict=True):
            own = torch.stack(sums(part, grad, weight, mean, variance, ctx.eps))
            scale = weight * (variance + ctx.eps).rsqrt()
            # The gradient through the statistics is linear in the normalised maps of a channel.
            shares = own * (-scale * x.shape[1] / part.numel())
            _normalise(part, (shares[0], shares[1]), mean, variance, ctx.eps, out)
            out.addcmul_(grad, scale.view(1, -1, 1, 1))
            of_parameters += own
        return of_x, *of_parameters, None, None


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, each (C,). x: (N, C, ...), in any order."""
    if not serve(x):
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    shape = -1, x.shape[1]
    means, variances = torch.batch_norm_update_stats(_folded(x), None, None, 0.0)
    means, variances = means.view(shape), variances.view(shape)
    # As by Chan, Golub and LeVeque (1979), of parts of the same size.
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


def sums(
    x: Tensor, grad: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias of a batch norm with these statistics, each (C,).

    Args:
        x: (N, C, ...), in any order.
        grad: of the result, likewise.
    """
    if not serve(x):
        return _sums(x, grad, weight, mean, variance, eps)
    rows, channels = _folded(x), len(mean)
    weight, mean, variance = (
        vector.repeat(rows.shape[1] // channels) for vector in (weight, mean, variance)
    )
    of_weights, of_biases = _sums(rows, _folded(grad), weight, mean, variance, eps)
    return of_weights.view(-1, channels).sum(0), of_biases.view(-1, channels).sum(0)


def _sums(
    x: Tensor, grad: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, mean, variance, None, None, False, eps, [False, True, True]
    )
    return of_weight, of_bias


def _normalise(
    x: Tensor,
    parameters: tuple[Tensor, Tensor],
    mean: Tensor,
    variance: Tensor,
    eps: float,
    out: Tensor,
) -> None:
    """Batch norm by given statistics. The parameters are weight and bias."""
    torch.ops.aten.native_batch_norm.out(
        *(x, *parameters, mean, variance, False, 0.0, eps),
        out=out,
        save_mean=x.new_empty(0),
        save_invstd=x.new_empty(0),
    )


def _chunks(count: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.chunk(count) for tensor in tensors]


def _folded(x: Tensor) -> Tensor:
    """The channels of F positions as if they were channels of one. (N, C, H, W) -> (P / F, F C).

    PyTorch's kernels add up the rows one by one. Of F sums, each has P / F terms.
    """
    positions = x.numel() // x.shape[1]
    return x.movedim(1, -1).reshape(positions // _fold(positions), -1)


@lru_cache
def _fold(positions: int) -> int:
    """The divisor of a number that is closest to its root, and not above it."""
    return next(k for k in range(math.isqrt(positions), 0, -1) if positions % k == 0)
