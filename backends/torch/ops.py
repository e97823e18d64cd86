"""``core.engine.Ops`` in PyTorch."""

from collections.abc import Sequence

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


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor, /, *, top: Sequence[int]) -> tuple[Tensor, ...]:
    """See ``core.engine.Ops``."""
    others = (logits >= logits.gather(1, labels[:, None])).sum(1) - 1
    return tuple(100.0 * (others < k).to(logits.dtype).mean() for k in top)


def row_dot(a: Tensor, b: Tensor, /) -> Tensor:
    """See ``core.engine.Ops``."""
    return (a * b).sum(1, keepdim=True)


def gather_rows(x: Tensor, index: Array, /) -> Tensor:
    """See ``core.engine.Ops``."""
    return x.index_select(0, torch.from_numpy(index).to(x.device))


def concat(parts: Sequence[Tensor], /, *, axis: int) -> Tensor:
    """See ``core.engine.Ops``."""
    return torch.cat(tuple(parts), dim=axis)
