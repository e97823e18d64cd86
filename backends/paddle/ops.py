"""Implements ``core.contracts.Ops`` in Paddle."""

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from triptych.backends.paddle.layers import unit_rows
from triptych.core.contracts import Index, Kind

no_grad = paddle.no_grad


def normalized(pixels: Tensor, levels: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    whole, mean, deviation = levels.astype("float32")
    return ((pixels.astype("float32") / whole - mean) / deviation).astype(levels.dtype)


def cast(x: Tensor, kind: Kind, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return x.astype(kind)


def where(condition: Tensor, a: Tensor, b: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return paddle.where(condition, a, b)


def replace_rows(x: Tensor, index: Index, rows: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    places = index if isinstance(index, Tensor) else paddle.to_tensor(index, place=x.place)
    return paddle.scatter(x, places, rows, overwrite=True)


SAFE_MARGIN = 60.0
"""How far the label's logit may be below its row's maximum for Paddle's own cross-entropy.

On the CPU, Paddle's cross-entropy takes a larger distance than 64 for 64, and its loss is wrong.
"""


def l2_normalize(x: Tensor, /, *, eps: float = 1e-12) -> Tensor:
    """See ``core.contracts.Ops``."""
    return unit_rows(x, eps)


def matmul(a: Tensor, b: Tensor, /, *, transpose_b: bool = False) -> Tensor:
    """See ``core.contracts.Ops``."""
    return paddle.matmul(a, b, transpose_y=transpose_b)


def cross_entropy(logits: Tensor, labels: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    peak = logits.detach().max(-1, keepdim=True)
    rows = paddle.stack([paddle.arange(len(labels)), labels], axis=1)
    if logits.place.is_cpu_place():
        margins = peak[:, 0] - paddle.gather_nd(logits.detach(), rows)
        # A nan must fail this test, too. Paddle 2.6 ignores nan in max, but not in a sum.
        if float(margins.max() + 0.0 * margins.sum()) < SAFE_MARGIN:
            return F.cross_entropy(logits, labels)
    # log_softmax has the same limit, and its cost grows with the square of the number of classes.
    shifted = logits - peak
    return (paddle.log(paddle.exp(shifted).sum(-1)) - paddle.gather_nd(shifted, rows)).mean()


def labels(values: Index, like: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``.

    Raises:
        ValueError: the labels are not int64, or not columns of ``like``. Paddle would cut off
            fractions, count a negative label from the end, and accept some too large labels.
    """
    if isinstance(values, Tensor):
        return values
    if values.dtype != np.int64 or not 0 <= values.min() <= values.max() < like.shape[-1]:
        raise ValueError(
            f"labels: expected int64, 0 <= label < {like.shape[-1]}, got {values.dtype} {values}"
        )
    return paddle.to_tensor(values, place=like.place)


@paddle.no_grad()
def accuracy(logits: Tensor, labels: Tensor, /, *, top: Sequence[int]) -> tuple[Tensor, ...]:
    """See ``core.contracts.Ops``."""
    of_label = paddle.take_along_axis(logits, labels.unsqueeze(1), 1)
    others = (logits >= of_label.expand_as(logits)).astype("int64").sum(1) - 1
    return tuple((others < k).astype(logits.dtype).mean() * 100.0 for k in top)


def row_dot(a: Tensor, b: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return (a * b).sum(1, keepdim=True)


def gather_rows(x: Tensor, index: Index, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    if isinstance(index, Tensor):
        return paddle.gather(x, index)
    # x[index] silently reads beyond the end of x. So does gather in Paddle 2.6.
    if index.min() < 0 or index.max() >= len(x):
        raise IndexError(f"rows {index.min()} to {index.max()} of {len(x)}")
    return paddle.gather(x, paddle.to_tensor(index, place=x.place))


@paddle.no_grad()
def soft_assign(x: Tensor, words: Tensor, sharpness: Tensor, /) -> tuple[Tensor, Tensor]:
    """See ``core.contracts.Ops``."""
    n, length, width = x.shape
    rows = unit_rows(x.reshape([-1, width]), 1e-5)
    cosine = paddle.matmul(rows, words, transpose_y=True)
    difference = (cosine.max(1) - cosine.mean(1)).reshape([n, length]).mean(1)
    return F.softmax(cosine * sharpness).reshape([n, length, words.shape[0]]), difference


def mean_tokens(x: Tensor, index: Index, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    there = index if isinstance(index, Tensor) else paddle.to_tensor(index, place=x.place)
    row = paddle.zeros([x.shape[1]], x.dtype)
    row = paddle.scatter(row, there, paddle.full([len(index)], 1.0 / len(index), x.dtype))
    weights = row.reshape([1, 1, -1]).expand([x.shape[0], -1, -1])
    return paddle.matmul(weights, x)[:, 0]


def gather_tokens(x: Tensor, index: Index, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return gather_rows(x.reshape([-1, x.shape[2]]), index)


def kl_divergence(target: Tensor, logits: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    # Paddle's soft cross-entropy and log_softmax limit the distance from a row's maximum to 64.
    shifted = logits - logits.detach().max(-1, keepdim=True)
    log = paddle.log(paddle.exp(shifted).sum(-1))
    return (log - (target * shifted).sum(-1)).mean() - entropy(target)


@paddle.no_grad()
def entropy(p: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    # The bound avoids log(0). Values below it add nothing.
    return -(p * paddle.log(paddle.clip(p, min=1e-30))).sum(-1).mean()


def concat(parts: Sequence[Tensor], /, *, axis: int) -> Tensor:
    """See ``core.contracts.Ops``."""
    return paddle.concat(list(parts), axis=axis)
