"""``core.engine.Ops`` in OneFlow."""

import numpy as np
import oneflow as flow
import oneflow.nn.functional as F
from oneflow import Tensor

from triptych.backends.oneflow.layers import repeat, row_mean
from triptych.core.engine import Array

no_grad = flow.no_grad


def l2_normalize(x: Tensor, /) -> Tensor:
    """See ``core.engine.Ops``."""
    # F.normalize bounds the squared norm by eps, in float32: rows near zero get wrong gradients.
    width = x.shape[1]
    norm = (row_mean(x * x) * width).clamp(min=1e-24).sqrt()
    return x * repeat(1.0 / norm, width)


def matmul(a: Tensor, b: Tensor, /, *, transpose_b: bool = False) -> Tensor:
    """See ``core.engine.Ops``."""
    return flow.matmul(a, b, transpose_b=transpose_b)


def cross_entropy(logits: Tensor, labels: Tensor, /) -> Tensor:
    """See ``core.engine.Ops``."""
    loss = F.cross_entropy(logits, labels)
    if logits.dtype == flow.float32 and not logits.is_cuda:
        # The kernel takes a nan beside the label for a number: a finite loss from broken features.
        loss = loss + 0.0 * row_mean(logits.detach().clamp(min=-1e30)).sum()
    return loss


def labels(values: Array, like: Tensor, /) -> Tensor:
    """See ``core.engine.Ops``.

    Raises:
        ValueError: a label is out of range, of which the kernel would make a constant loss.
    """
    classes = like.shape[1]
    if values.size and not 0 <= values.min() <= values.max() < classes:
        raise ValueError(
            f"labels: expected 0 <= label < {classes}, got {values.min()}..{values.max()}"
        )
    return flow.from_numpy(values.astype(np.int64)).to(like.device)
