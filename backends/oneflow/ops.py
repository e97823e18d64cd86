"""Implements ``core.contracts.Ops`` in OneFlow."""

from collections.abc import Sequence

import numpy as np
import oneflow as flow
import oneflow.nn.functional as F
from oneflow import Tensor

from triptych.backends.oneflow import products, sums
from triptych.backends.oneflow.sums import repeat, row_mean, row_sum, unit_rows
from triptych.core.contracts import Index, Kind

no_grad = flow.no_grad


def normalized(pixels: Tensor, levels: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    whole, mean, deviation = levels.to(flow.float32)
    return ((pixels.to(flow.float32) / whole - mean) / deviation).to(levels.dtype)


def cast(x: Tensor, kind: Kind, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return x.to(getattr(flow, kind))


def where(condition: Tensor, a: Tensor, b: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return flow.where(condition, a, b)


def replace_rows(x: Tensor, index: Index, rows: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    places = _index(index, len(x), x, "row").reshape(-1, 1)
    return flow.tensor_scatter_nd_update(x, places, rows)


def l2_normalize(x: Tensor, /, *, eps: float = 1e-12) -> Tensor:
    """See ``core.contracts.Ops``."""
    return unit_rows(x, eps)


def matmul(a: Tensor, b: Tensor, /, *, transpose_b: bool = False) -> Tensor:
    """See ``core.contracts.Ops``."""
    return products.matmul(a, b, transpose_b=transpose_b)


def cross_entropy(logits: Tensor, labels: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    loss = F.cross_entropy(logits, labels)
    if logits.dtype == flow.float32 and not logits.is_cuda:
        # The kernel ignores nan in other columns than the label's. This term is then nan, else 0.
        loss = loss + 0.0 * row_mean(logits.detach().clamp(min=-1e30)).sum()
    return loss


def labels(values: Index, like: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``.

    Raises:
        ValueError: a label is out of range. The kernel would return a constant loss for it.
    """
    return _index(values, like.shape[1], like, "label")


@flow.no_grad()
def accuracy(logits: Tensor, labels: Tensor, /, *, top: Sequence[int]) -> tuple[Tensor, ...]:
    """See ``core.contracts.Ops``."""
    of_label = repeat(logits.gather(1, labels.reshape(-1, 1)), logits.shape[1])
    others = row_sum((logits >= of_label).to(logits.dtype)) - 1.0
    return tuple(100.0 * (others < k).to(logits.dtype).mean() for k in top)


def row_dot(a: Tensor, b: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return row_sum(a * b)


def gather_rows(x: Tensor, index: Index, /) -> Tensor:
    """See ``core.contracts.Ops``.

    Raises:
        ValueError: an index is out of range. The kernel would return zeros for it.
    """
    return x.index_select(0, _index(index, len(x), x, "row"))


@flow.no_grad()
def soft_assign(x: Tensor, words: Tensor, sharpness: Tensor, /) -> tuple[Tensor, Tensor]:
    """See ``core.contracts.Ops``."""
    n, length, width = x.shape
    rows = unit_rows(x.reshape(-1, width), 1e-5)
    cosine = products.matmul(rows, words, transpose_b=True)
    difference = cosine.amax(1, keepdim=True) - row_mean(cosine)
    codes = F.softmax(cosine * sharpness, dim=-1)
    return codes.reshape(n, length, -1), row_mean(difference.reshape(n, length)).reshape(-1)


def mean_tokens(x: Tensor, index: Index, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    there = _index(index, x.shape[1], x, "token")
    if sums.plain_forms_serve(x):
        return x.index_select(1, there).mean(1)
    weights = flow.zeros((x.shape[1],), dtype=x.dtype, device=x.device)
    weights[there] = 1.0 / len(index)
    product = flow.matmul(weights.reshape(1, 1, -1).expand(len(x), 1, -1), x)
    return product.reshape(len(x), x.shape[2])


def gather_tokens(x: Tensor, index: Index, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return gather_rows(x.reshape(-1, x.shape[2]), index)


def kl_divergence(target: Tensor, logits: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    log = F.log_softmax(logits, dim=1)
    return -row_sum(target * log).mean() - entropy(target)


@flow.no_grad()
def entropy(p: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    # The bound avoids log(0). Values below it add nothing.
    return -row_sum(p * p.clamp(min=1e-30).log()).mean()


def concat(parts: Sequence[Tensor], /, *, axis: int) -> Tensor:
    """See ``core.contracts.Ops``."""
    return flow.cat(list(parts), dim=axis)


def _index(values: Index, size: int, like: Tensor, what: str) -> Tensor:
    if not isinstance(values, np.ndarray):
        return values
    if values.size and not 0 <= values.min() <= values.max() < size:
        raise ValueError(
            f"{what}s: expected 0 <= {what} < {size}, got {values.min()}..{values.max()}"
        )
    return flow.from_numpy(values.astype(np.int64)).to(like.device)
