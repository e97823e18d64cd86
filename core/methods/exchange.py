"""Sums, means and rows over the copies of a model, with one exchange for several tensors."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from triptych.core.contracts import Batch, Group, Ops, Tensor, evenly


def summed(ops: Ops, group: Group, values: Sequence[Tensor]) -> list[Tensor]:
    """The sum over a group of each tensor, of any shape. The shapes are the same everywhere."""
    if group.count == 1:
        return list(values)
    total = group.sum(ops.concat([x.reshape([-1]) for x in values], axis=0))
    sums, start = [], 0
    for x in values:
        shape = [int(size) for size in x.shape]
        stop = start + math.prod(shape)
        sums.append(total[start:stop].reshape(shape))
        start = stop
    return sums


def averaged(ops: Ops, group: Group, values: Sequence[Tensor]) -> list[Tensor]:
    """The mean over a group of each tensor. Every member has as many images as any other."""
    if group.count == 1:
        return list(values)
    return [x / group.count for x in summed(ops, group, values)]


def summed_by_name(ops: Ops, group: Group, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``summed`` for tensors by name. The names are the same everywhere."""
    return dict(zip(values, summed(ops, group, list(values.values())), strict=True))


def gathered(ops: Ops, replicas: Group, x: Tensor, batch: Batch) -> Tensor:
    """The rows of the step's batch, from the rows that each copy of the model has.

    Args:
        x: (V * n, ...): n images of this copy in each of V views, view 1 first.
        batch: the images of this copy.

    Returns:
        (V * N, ...), view 1 first.
    """
    if replicas.count == 1:
        return x
    own = len(batch.index)
    sizes = [_length(evenly(batch.whole_size, r, replicas.count)) for r in range(replicas.count)]
    most = max(sizes)
    # A copy with fewer images repeats its last one, as all copies send the same shape.
    send = np.minimum(np.arange(most), own - 1)
    keep = np.concatenate([r * most + np.arange(size) for r, size in enumerate(sizes)])
    rows = [replicas.gather(ops.gather_rows(x, view * own + send)) for view in range(len(x) // own)]
    return ops.concat([ops.gather_rows(view, keep) for view in rows], axis=0)


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)
