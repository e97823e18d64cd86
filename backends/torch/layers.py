"""Batch norm that normalises parts of a batch separately, as several devices would.

Shape letters: N images, C channels.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from triptych.backends.torch import maps
from triptych.core.config.spec import BatchNormSpec
from triptych.core.contracts import Group


class BatchNorm(_BatchNorm):
    """PyTorch's batch norm for any number of dimensions, with virtual ranks in training.

    Each of ``virtual_ranks`` contiguous parts of a training batch is normalised separately. The
    running statistics are those of the first part, which the first rank would save. They stay as
    they are while ``tracking`` is False. The running variance is unbiased unless ``biased`` is set.
    Several processes in ``group`` normalise their images together, as one part.

    If ``alternating`` is set, the parts are not contiguous: the images of a batch belong to them in
    turn (see ``taking_turns``). Then one call normalises all parts, without a copy.

    The base class has no public name. The public classes accept one number of dimensions each.
    """

    virtual_ranks = 1
    alternating = False
    biased = False
    tracking = True
    group = Group()

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over all axes but the second. (N, C, ...) -> (N, C, ...)."""
        if not self.training:
            return super().forward(x)
        if self.group.count > 1:
            return self._synchronised(x)
        if maps.serve(x):
            return self._last(x)
        if self.alternating and not len(x) % self.virtual_ranks:
            return self._alternating(x)
        track = self._track_biased if self.biased else super().forward
        if not self.tracking:
            track = self._normalise
        if self.virtual_ranks == 1:
            return track(x)
        first, *others = x.chunk(self.virtual_ranks)
        return torch.cat([track(first), *map(self._normalise, others)])

    def _normalise(self, x: Tensor) -> Tensor:
        """Normalises without running statistics."""
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)

    def _last(self, x: Tensor) -> Tensor:
        """Normalises parts of maps with channels last. (N, C, H, W)."""
        parts = x.chunk(self.virtual_ranks)
        moments = [maps.statistics(part.detach()) for part in parts]
        if self.tracking:
            self._track_moments(*moments[0], parts[0].numel() // x.shape[1])
        y: Tensor = maps.BatchNorm.apply(x, self.weight, self.bias, moments, self.eps)
        return y

    def _alternating(self, x: Tensor) -> Tensor:
        """Normalises the channels of each part as channels of their own."""
        ranks, channels = self.virtual_ranks, x.shape[1]
        rows = x.reshape(len(x) // ranks, ranks * channels, *x.shape[2:])
        weight, bias = (p if p is None else p.repeat(ranks) for p in (self.weight, self.bias))
        if self.tracking:
            y, mean, variance = self._measured(rows, weight, bias)
            count = rows.numel() // rows.shape[1]
            mean, variance = mean[:channels], variance[:channels]
            self._track(mean, variance * ((count - 1) / count) if self.biased else variance)
        else:
            y = F.batch_norm(rows, None, None, weight, bias, training=True, eps=self.eps)
        # The activation that follows works in place, and the gradient of a view would be copied.
        return cast(Tensor, torch.ops.aten._unsafe_view(y, x.shape))

    def _track_biased(self, x: Tensor) -> Tensor:
        """Normalises by the statistics of ``x``, which enter the running ones."""
        y, mean, variance = self._measured(x, self.weight, self.bias)
        count = x.numel() // x.shape[1]
        self._track(mean, variance * ((count - 1) / count))
        return y

    def _measured(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised ``x``, the mean of each channel and its unbiased variance."""
        # With momentum 1, the kernel replaces these numbers by the statistics of the batch. A
        # change of its result in place would fail: the backward pass has saved it.
        mean, variance = self.running_mean.new_zeros(2, x.shape[1])
        y = F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps)
        return y, mean, variance

    def _synchronised(self, x: Tensor) -> Tensor:
        """Normalises by the statistics of all processes in the group."""
        mean, variance, count = joint_statistics(x.detach(), self.group)
        if self.tracking:
            self._track_moments(mean, variance, count)
        weight = torch.ones_like(mean) if self.weight is None else self.weight
        bias = torch.zeros_like(mean) if self.bias is None else self.bias
        y: Tensor = SyncBatchNorm.apply(
            x, weight, bias, mean, variance, count, self.eps, self.group
        )
        return y

    def _track_moments(self, mean: Tensor, variance: Tensor, count: Tensor | int) -> None:
        """Moves the running statistics by a biased variance of so many values."""
        self._track(mean, variance if self.biased else variance * (count / (count - 1)))

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics towards those of a batch."""
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked.add_(1)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accepts any shape."""


def taking_turns(x: Tensor, parts: int) -> Tensor:
    """The rows of so many contiguous parts, in turn: the first row of each part, then the second.

    ``len(x) // parts`` instead of ``parts`` undoes this. (N, ...) -> (N, ...).
    """
    return x.unflatten(0, (parts, -1)).transpose(0, 1).flatten(0, 1)


def joint_statistics(x: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of the images of all processes, which may have different numbers of them.

    The processes' means and variances are joined as by Chan, Golub and LeVeque (1979). Sums of
    squares would cancel.

    Args:
        x: (N, C, ...), of this process.

    Returns:
        mean: (C,), in float32 or wider.
        variance: (C,), likewise, biased.
        count: (), number of values of a channel.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    local = maps.statistics(wide)
    size = wide.new_full((1,), x.numel() // x.shape[1])
    means, variances, sizes = group.gather(torch.cat([*local, size])[None]).split(
        [x.shape[1], x.shape[1], 1], dim=1
    )
    count = sizes.sum()
    mean = (means * sizes).sum(0) / count
    variance = ((variances + (means - mean).square()) * sizes).sum(0) / count
    return mean, variance, count


class SyncBatchNorm(torch.autograd.Function):
    """Batch norm by the statistics of a group of processes.

    ``nn.SyncBatchNorm`` refuses the CPU. The passes over the activations are the kernels of a batch
    norm with given statistics. The gradient of the images is the sum of two parts: one through the
    normalised images and one through the statistics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
        group: Group,
    ) -> Tensor:
        """(N, C, ...) -> (N, C, ...). The other arguments as ``joint_statistics`` gives them."""
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.group = eps, group
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of this process's images and of its share of the parameters'."""
        x, weight, mean, variance, count = ctx.saved_tensors
        of_weight, of_bias = maps.sums(x, gradients[0], weight, mean, variance, ctx.eps)
        of_weights, of_biases = ctx.group.sum(torch.stack([of_weight, of_bias])) / count
        scale = weight * (variance + ctx.eps).rsqrt()
        # The gradient through the statistics is linear in the normalised images of a channel. The
        # kernel of a batch norm computes it in one pass over the images.
        of_x = F.batch_norm(
            x, mean, variance, -scale * of_weights, -scale * of_biases, training=False, eps=ctx.eps
        )
        of_x.addcmul_(gradients[0], scale.view((1, -1) + (1,) * (x.ndim - 2)))
        return of_x, of_weight, of_bias, None, None, None, None, None


def set_batch_norm(model: nn.Module, spec: BatchNormSpec, group: Group) -> None:
    """Applies the section ``batch_norm`` of one process to all batch norms in a module.

    Args:
        group: processes whose batch norms share their statistics.
    """
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
