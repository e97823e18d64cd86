"""Implements ``core.contracts.Ops`` in PyTorch."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.core.contracts import Index, Kind

no_grad = torch.no_grad


def normalized(pixels: Tensor, levels: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    # CUDA multiplies by the reciprocal of a Python number; it divides by a tensor.
    whole, mean, deviation = levels.float()
    return (pixels / whole).sub_(mean).div_(deviation).to(levels.dtype)


def cast(x: Tensor, kind: Kind, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return x.to(getattr(torch, kind))


def where(condition: Tensor, a: Tensor, b: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return torch.where(condition, a, b)


def replace_rows(x: Tensor, index: Index, rows: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return x.index_copy(0, _index(index, x), rows)


def l2_normalize(x: Tensor, /, *, eps: float = 1e-12) -> Tensor:
    """See ``core.contracts.Ops``."""
    return F.normalize(x, dim=-1, eps=eps)


def matmul(a: Tensor, b: Tensor, /, *, transpose_b: bool = False) -> Tensor:
    """See ``core.contracts.Ops``."""
    return a @ (b.mT if transpose_b else b)


def cross_entropy(logits: Tensor, labels: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return F.cross_entropy(logits, labels)


def labels(values: Index, like: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return _index(values, like)


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor, /, *, top: Sequence[int]) -> tuple[Tensor, ...]:
    """See ``core.contracts.Ops``."""
    others = (logits >= logits.gather(1, labels[:, None])).sum(1) - 1
    return tuple(100.0 * (others < k).to(logits.dtype).mean() for k in top)


def row_dot(a: Tensor, b: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return (a * b).sum(1, keepdim=True)


def gather_rows(x: Tensor, index: Index, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return x.index_select(0, _index(index, x))


@torch.no_grad()
def soft_assign(
    x: Tensor,
    words: Tensor,
    sharpness: Tensor,
    /,
    *,
    product: Callable[[Tensor, Tensor], Tensor] = lambda a, b: a @ b.mT,
) -> tuple[Tensor, Tensor]:
    """See ``core.contracts.Ops``.

    Args:
        product: of rows and rows, (N, L, D), (K, D) -> (N, L, K).
    """
    cosine = product(l2_normalize(x, eps=1e-5), words)
    difference = (cosine.amax(-1) - cosine.mean(-1)).mean(1)
    return cosine.mul_(sharpness).softmax(-1), difference


def mean_tokens(x: Tensor, index: Index, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    weights = torch.zeros(1, x.shape[1], dtype=x.dtype, device=x.device)
    weights.index_fill_(1, _index(index, x), 1.0 / len(index))
    # Indexing would copy the tokens. A product with weights does not.
    return (weights @ x)[:, 0]


def gather_tokens(x: Tensor, index: Index, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return gather_rows(x.flatten(0, 1), index)


def kl_divergence(target: Tensor, logits: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return F.cross_entropy(logits, target) - entropy(target)


@torch.no_grad()
def entropy(p: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return torch.special.entr(p).sum() / len(p)


def concat(parts: Sequence[Tensor], /, *, axis: int) -> Tensor:
    """See ``core.contracts.Ops``."""
    return torch.cat(tuple(parts), dim=axis)


def _index(values: Index, like: Tensor) -> Tensor:
    return values if isinstance(values, Tensor) else torch.from_numpy(values).to(like.device)
