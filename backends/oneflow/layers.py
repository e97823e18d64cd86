"""Replacements of layers that are slow or inexact on OneFlow's CPU, made of OneFlow's operations.

Hyper-parameters are operands, since a kernel rounds its attributes to float32. The context of a
``Function`` keeps saved tensors only: any other attribute crashes the process.

Shape letters: R virtual ranks, N rows or images, D columns, C channels, P positions of a map.
"""

from functools import cache
from typing import Any

import numpy as np
import oneflow as flow
import oneflow.nn.functional as F
from oneflow import Tensor, nn

from triptych.backends.oneflow import channels, kernels, norms, sums
from triptych.backends.oneflow.products import in_float32, linear
from triptych.backends.oneflow.sums import centred_rows, channel_sum, constant, row_mean
from triptych.core.config.spec import BatchNormSpec
from triptych.core.contracts import Group


def in_numpy(x: Tensor) -> bool:
    """Whether to compute with ``kernels``, which are faster than OneFlow's kernels on the CPU."""
    return not x.is_cuda


class LayerNorm(nn.Module):
    """Layer norm over the last axis: first the mean, then the variance around it.

    On a GPU, OneFlow's own kernel passes over the tokens fewer times than the operations here.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(flow.ones(width))
        self.bias = nn.Parameter(flow.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        rows = x.reshape(-1, x.shape[-1])
        if in_float32(x):
            return self._normalize_in_numpy(rows).reshape(*x.shape)
        if sums.plain_forms_serve(x):
            return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)
        with flow.no_grad():
            centred = centred_rows(rows)
            inverse = (row_mean(centred * centred) + self.eps).rsqrt()
        y = norms.NormalizeRows.apply(rows, centred, inverse, self.weight, self.bias)
        return y.reshape(*x.shape)

    def _normalize_in_numpy(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        weight, bias = self.weight, self.bias
        if flow.is_grad_enabled():
            return norms.normalize_rows_in_numpy(self.eps).apply(x, weight, bias)
        y, *_ = kernels.normalize_rows(x.numpy(), weight.numpy(), bias.numpy(), self.eps)
        return flow.from_numpy(y)


class BatchNorm(nn.Module):
    """Batch norm with virtual ranks in training.

    Each of ``virtual_ranks`` contiguous parts of a training batch is normalised separately. If
    ``group`` has several processes, the batches of all of them are normalised as one. The running
    statistics are those of the first part, which the first rank would save. They stay as they are
    while ``tracking`` is False. The running variance is unbiased unless ``biased`` is set.

    OneFlow's batch norm serves on no device: it rounds eps and momentum to float32, and on the CPU
    computes the variance as E[x^2] - E[x]^2, which loses digits if the mean is large.
    """

    virtual_ranks = 1
    biased = False
    group = Group()
    tracking = True

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
        """Normalises over all axes but the second. (N, C, ...) -> (N, C, ...).

        Raises:
            ValueError: in training, a channel has one value only, which has no variance.
        """
        if not self.training:
            return self._evaluate(x)
        n, width = x.shape[:2]
        ranks = self.virtual_ranks
        self.check(x.numel() // width)
        parts = x.reshape(ranks, n // ranks, width, -1)
        if x.ndim > 2 and in_numpy(x):
            return self._normalize_in_numpy(parts).reshape(*x.shape)
        # The parts of the batch become further channels.
        each = parts.transpose(0, 1) if ranks > 1 else parts
        y = self._normalize(each.reshape(n // ranks, ranks * width, -1, 1))
        if ranks > 1:
            y = y.reshape(n // ranks, ranks, width, -1).transpose(0, 1)
        return y.reshape(*x.shape)

    def check(self, count: int) -> None:
        """Raises ValueError if ``count`` values of a channel are one for each virtual rank."""
        if count == self.virtual_ranks and self.group.count == 1:
            raise ValueError("batch norm: expected at least 2 values per channel, got 1")

    @flow.no_grad()
    def track(self, mean: Tensor, variance: Tensor, count: Tensor | float) -> None:
        """Takes in the mean and the unbiased variance of ``count`` values of each channel."""
        if not self.tracking:
            return
        width, keep = len(self.running_mean), 1.0 - self.momentum
        if self.biased:
            variance = variance * ((count - 1) / count)
        self.running_mean.mul_(keep).add_(mean[:width], alpha=self.momentum)
        self.running_var.mul_(keep).add_(variance[:width], alpha=self.momentum)
        self.num_batches_tracked.add_(1)

    def _normalize(self, x: Tensor) -> Tensor:
        """Normalises over images and positions. (N, C, P, 1) -> (N, C, P, 1)."""
        number = x.numel() // x.shape[1]
        with flow.no_grad():
            count, whole = norms.total(self.group, number, channel_sum(x))
            mean = whole / count
            centred = x - mean
            _, square = norms.total(self.group, number, channel_sum(centred * centred))
            self.track(mean.reshape(-1), (square / (count - 1)).reshape(-1), count)
            inverse = (square / count + self.eps).rsqrt()
        weight, bias = (flow.cat([tensor] * self.virtual_ranks) for tensor in self._affine())
        return norms.normalize_channels(self.group).apply(x, centred, inverse, weight, bias)

    def _normalize_in_numpy(self, x: Tensor) -> Tensor:
        """Normalises each rank separately. (R, N, C, P) -> (R, N, C, P)."""
        weight, bias = self._affine()
        # Both in one array: each wait for OneFlow's queue takes as long as many additions.
        with flow.no_grad():
            affine = flow.stack([weight, bias]).numpy()
        keep = flow.is_grad_enabled()
        y, centred, inverse, statistics, count = channels.normalize(
            x.numpy(), affine, self.eps, keep=keep, total=norms.total_in_numpy(self.group)
        )
        self.track(*flow.from_numpy(statistics), count)
        if not keep:
            return flow.from_numpy(y)
        y, centred, factors = map(flow.from_numpy, (y, centred, np.vstack([affine[:1], inverse])))
        function = norms.normalize_channels_in_numpy(self.group)
        return function.apply(x, weight, bias, y, centred, factors)

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
            constant(1, len(like), value, like.dtype, like.device).reshape(-1)
            for value in (1.0, 0.0)
        )


def set_batch_norm(model: nn.Module, spec: BatchNormSpec, group: Group) -> None:
    """Applies the section ``batch_norm`` to all batch norms in a module."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.virtual_ranks = spec.virtual_ranks
            module.biased = spec.running_variance == "biased"
            module.group = group


def set_tracking(model: nn.Module, flag: bool) -> None:
    """Sets whether the batch norms in a module move their running statistics."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.tracking = flag


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
    """A convolution of x and weight. If ``of_x`` is set, x gets a gradient, too."""

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
    """OneFlow's square convolution, computed in faster ways on the CPU."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # OneFlow would keep the memory of this weight, which ``flat.pack`` replaces, between that
        # of the norms: in pieces too small for what comes later. NumPy's memory serves again.
        self.weight = nn.Parameter(flow.from_numpy(self.weight.numpy().copy()))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, height, width)."""
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

    The convolution is computed as a matrix product: OneFlow's kernel is twice as slow. ``proj`` may
    also be a convolutional stem, which maps images to (N, D, rows, columns).
    """

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the patches in row-major order."""
        if isinstance(self.proj, nn.Sequential):
            return self.proj(images).flatten(2).transpose(1, 2)
        weight = self.proj.weight
        n, c, height, width = images.shape
        p = weight.shape[-1]
        patches = images.reshape(n, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(n, -1, c * p * p)
        return linear(patches, weight.reshape(weight.shape[0], -1), self.proj.bias)
