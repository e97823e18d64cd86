"""Batch norm that normalises parts of a batch separately, as several devices would."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from triptych.core.config.spec import BatchNormSpec
from triptych.core.contracts import Group


class BatchNorm(_BatchNorm):
    """PyTorch's batch norm for any number of dimensions, with virtual ranks in training.

    Each of ``virtual_ranks`` contiguous parts of a training batch is normalised separately. The
    running statistics are those of the first part, which the first rank would save. They stay as
    they are while ``tracking`` is False. The running variance is unbiased unless ``biased`` is set.

    The base class has no public name. The public classes accept one number of dimensions each.
    """

    virtual_ranks = 1
    biased = False
    group = Group()
    tracking = True

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over all axes but the second. (N, C, ...) -> (N, C, ...)."""
        if not self.training:
            return super().forward(x)
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

    def _track_biased(self, x: Tensor) -> Tensor:
        """Normalises by the statistics of ``x``, which enter the running ones."""
        # With momentum 1, the kernel replaces these numbers by the batch's mean and unbiased
        # variance. A change of its result in place would fail: the backward pass has saved it.
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(
            x, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps
        )
        count = x.numel() // x.shape[1]
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * ((count - 1) / count), self.momentum)
        self.num_batches_tracked.add_(1)
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        """Accepts any shape."""


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
