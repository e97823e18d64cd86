"""Batch norm that normalises parts of a batch separately, as several devices would."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNorm(_BatchNorm):
    """PyTorch's batch norm for any number of dimensions, with virtual ranks in training.

    Each of ``virtual_ranks`` contiguous parts of a training batch is normalised separately. The
    running statistics are those of the first part, which the first rank would save.

    The base class has no public name. The public classes accept one number of dimensions each.
    """

    virtual_ranks = 1

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over all axes but the second. (N, C, ...) -> (N, C, ...)."""
        if not self.training or self.virtual_ranks == 1:
            return super().forward(x)
        first, *others = x.chunk(self.virtual_ranks)
        parts = [super().forward(first)]
        for part in others:
            gain, shift = self.weight, self.bias
            parts.append(F.batch_norm(part, None, None, gain, shift, training=True, eps=self.eps))
        return torch.cat(parts)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accepts any shape."""


def set_virtual_ranks(model: nn.Module, count: int) -> None:
    """Sets the number of virtual ranks of all batch norms in a module."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.virtual_ranks = count
