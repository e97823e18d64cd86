"""``core.contracts.Ops`` in NumPy."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import autograd.numpy as np
from autograd.tracer import getval

from triptych.core.contracts import Index, Kind, Tensor


def normalized(pixels: Tensor, levels: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    whole, mean, deviation = levels.astype(np.float32)
    return ((pixels.astype(np.float32) / whole - mean) / deviation).astype(levels.dtype)


def cast(x: Tensor, kind: Kind, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return x.astype(kind)


def where(condition: Tensor, a: Tensor, b: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return np.where(condition, a, b)


def replace_rows(x: Tensor, index: Index, rows: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    x = x.copy()
    x[index] = rows
    return x


def l2_normalize(x: Tensor, /, *, eps: float = 1e-12) -> Tensor:
    """See ``core.contracts.Ops``."""
    # The maximum is taken before the root: the root has no derivative at 0, and gives nan there.
    return x / np.sqrt(np.maximum(np.sum(x * x, axis=-1, keepdims=True), eps * eps))


def matmul(a: Tensor, b: Tensor, /, *, transpose_b: bool = False) -> Tensor:
    """See ``core.contracts.Ops``."""
    return a @ (np.swapaxes(b, -1, -2) if transpose_b else b)


def cross_entropy(logits: Tensor, labels: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    shifted = logits - np.max(logits, axis=1, keepdims=True)
    picked = shifted[np.arange(len(labels)), labels]
    return np.mean(np.log(np.sum(np.exp(shifted), axis=1)) - picked)


def labels(values: Index, like: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return values


def accuracy(logits: Tensor, labels: Tensor, /, *, top: Sequence[int]) -> tuple[Tensor, ...]:
    """See ``core.contracts.Ops``."""
    logits = getval(logits)
    others = np.sum(logits >= logits[np.arange(len(labels)), labels][:, None], axis=1) - 1
    return tuple(100.0 * np.mean(others < k) for k in top)


def row_dot(a: Tensor, b: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return np.sum(a * b, axis=1, keepdims=True)


def gather_rows(x: Tensor, index: Index, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return x[index]


def soft_assign(x: Tensor, words: Tensor, sharpness: Tensor, /) -> tuple[Tensor, Tensor]:
    """See ``core.contracts.Ops``."""
    cosine = l2_normalize(x, eps=1e-5) @ words.T
    weights = np.exp(sharpness * (cosine - np.max(cosine, axis=-1, keepdims=True)))
    codes = weights / np.sum(weights, axis=-1, keepdims=True)
    return codes, np.mean(np.max(cosine, axis=-1) - np.mean(cosine, axis=-1), axis=1)


def mean_tokens(x: Tensor, index: Index, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return np.mean(x[:, index], axis=1)


def gather_tokens(x: Tensor, index: Index, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return x[index // x.shape[1], index % x.shape[1]]


def kl_divergence(target: Tensor, logits: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    shifted = logits - np.max(logits, axis=1, keepdims=True)
    log = shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True))
    return -np.mean(np.sum(target * log, axis=1)) - entropy(target)


def entropy(p: Tensor, /) -> Tensor:
    """See ``core.contracts.Ops``."""
    return -np.mean(np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=1))


def concat(parts: Sequence[Tensor], /, *, axis: int) -> Tensor:
    """See ``core.contracts.Ops``."""
    return np.concatenate(parts, axis=axis)


def no_grad() -> AbstractContextManager[None]:
    """See ``core.contracts.Ops``. Nothing to do: autograd never traces the teacher's arrays."""
    return nullcontext()
