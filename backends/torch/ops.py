"""``core.engine.Ops`` in PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.core.engine import Array

no_grad = torch.no_grad


def l2_normalize(x: Tensor, /) -> Tensor:
    """See ``core.engine.Ops``."""
    return F.normalize(x, dim=-1, eps=1e-12)


def matmul(a: Tensor, b: Tensor, /, *, transpose_b: bool = False) -> Tensor:
    """See ``core.engine.Ops``."""
    return a @ (b.mT if transpose_b else b)


def cross_entropy(logits: Tensor, labels: Tensor, /) -> Tensor:
    """See ``core.engine.Ops``."""
    return F.cross_entropy(logits, labels)


def labels(values: Array, like: Tensor, /) -> Tensor:
    """See ``core.engine.Ops``."""
    return torch.from_numpy(values).to(like.device)
