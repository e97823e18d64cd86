"""``core.engine.Ops`` in NumPy."""

from contextlib import AbstractContextManager, nullcontext

import autograd.numpy as np

from triptych.core.engine import Array, Tensor


def l2_normalize(x: Tensor, /) -> Tensor:
    """See ``core.engine.Ops``."""
    return x / np.maximum(np.sqrt(np.sum(x * x, axis=-1, keepdims=True)), 1e-12)


def matmul(a: Tensor, b: Tensor, /, *, transpose_b: bool = False) -> Tensor:
    """See ``core.engine.Ops``."""
    return a @ (np.swapaxes(b, -1, -2) if transpose_b else b)


def cross_entropy(logits: Tensor, labels: Tensor, /) -> Tensor:
    """See ``core.engine.Ops``."""
    shifted = logits - np.max(logits, axis=1, keepdims=True)
    picked = shifted[np.arange(len(labels)), labels]
    return np.mean(np.log(np.sum(np.exp(shifted), axis=1)) - picked)


def labels(values: Array, like: Tensor, /) -> Tensor:
    """See ``core.engine.Ops``."""
    return values


def no_grad() -> AbstractContextManager[None]:
    """See ``core.engine.Ops``; the teacher's arrays are never traced, so nothing is to be done."""
    return nullcontext()
