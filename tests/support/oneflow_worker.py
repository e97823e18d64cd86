"""One of two processes on OneFlow. It computes cases and writes what it finds; then one is killed.

Arguments: a folder, then names of functions of this module.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
from support.native import tiny_spec

from triptych import backends
from triptych.core.contracts import Array, Group, Ranks

Found = dict[str, Array]


def groups(ranks: Ranks) -> Found:
    """What each kind of exchange gives, for tensors that name their process."""
    import oneflow as flow

    found: Found = {}
    for name in ("replicas", "tensor", "pipeline", "norms"):
        group = getattr(ranks, name)
        for dtype in (flow.float32, flow.float64, flow.int64):
            # A view with an offset: part of a packed buffer.
            x = (flow.arange(8).reshape(4, 2) + 10 * ranks.rank).to(dtype)[2:]
            key = f"{name}.{dtype}"
            found[f"{key}.sum"] = group.sum(x).numpy().copy()
            found[f"{key}.gather"] = group.gather(x).numpy().copy()
            group.broadcast(x)
            found[f"{key}.broadcast"] = x.numpy().copy()
        count = flow.tensor(ranks.rank, dtype=flow.int64)
        group.broadcast(count)
        found[f"{name}.scalar"] = count.numpy().copy()
    found["largest"] = np.array([ranks.largest(7 * ranks.rank), ranks.any(ranks.rank == 1)])
    return found


def batch_norm(ranks: Ranks) -> Found:
    """Batch norm of unequal parts of a batch."""
    rows = (slice(0, 5), slice(5, 8))[ranks.rank]
    return {
        f"{len(shape)}.{name}": array
        for shape in ((8, 6), (8, 6, 3, 5))
        for name, array in normalized(shape, rows, ranks.replicas).items()
    }


def normalized(shape: tuple[int, ...], rows: slice, group: Group) -> Found:
    """Values, gradients and running statistics of batch norm.

    Args:
        shape: of the whole batch.
        rows: that this process has.
        group: the processes that share the statistics.
    """
    import oneflow as flow

    from triptych.backends.oneflow import layers

    x, probe = np.random.default_rng(5).standard_normal((2, *shape)) + 3.0
    layer = layers.BatchNorm(6).to(flow.float64)
    layer.group = group
    leaf = flow.tensor(x[rows]).requires_grad_(True)
    y = layer(leaf)
    (y * flow.tensor(probe[rows])).sum().backward()
    found = {name: group.sum(p.grad) for name, p in layer.named_parameters()}
    found.update({"y": y.detach(), "grad": leaf.grad, **dict(layer.named_buffers())})
    return {name: tensor.numpy().copy() for name, tensor in found.items()}


def main(folder: Path, *cases: str) -> None:
    """Computes the cases and writes them to ``<rank>.npz``. The second process is killed then."""
    ranks = backends.load("oneflow").join(tiny_spec(parallel={"data": 2}))
    found = {
        f"{case}.{name}": array for case in cases for name, array in globals()[case](ranks).items()
    }
    np.savez(folder / f"{ranks.rank}.npz", **found)
    ranks.largest(0)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.largest(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
