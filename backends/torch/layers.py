"""Batch norm over parts of a batch, as on many devices."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNorm(_BatchNorm):
    """PyTorch's, for any number of dimensions, with virtual ranks in training.

    Each of ``virtual_ranks`` contiguous parts of the batch is normalised by itself; the running
    statistics are those of the first part, as a first rank would save them.
    """

    virtual_ranks = 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...), normalised over all axes but the second."""
        if not self.training or self.virtual_ranks == 1:
            return super().forward(x)
        first, *others = x.chunk(self.virtual_ranks)
        parts = [super().forward(first)]
        for part in others:
            gain, shift = self.weight, self.bias
            parts.append(F.batch_norm(part, None, None, gain, shift, training=True, eps=self.eps))
        return torch.cat(parts)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any shape."""


def set_virtual_ranks(model: nn.Module, count: int) -> None:
    """Tells every batch norm inside how many parts a batch has."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.virtual_ranks = count
