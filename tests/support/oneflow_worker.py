"""One of several processes on OneFlow. It computes cases and writes what it finds.

Arguments: a folder, then names of functions of this module.
"""

import os
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
from support.native import tiny_spec

from triptych import backends
from triptych.core.contracts import Array, Ranks

Found = dict[str, Array]
GRID = {2: {"data": 2}, 4: {"data": 2, "tensor": 2}}
"""Number of processes -> degrees."""


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
    """Batch norm of unequal parts of a batch: values, gradients and running statistics."""
    import oneflow as flow

    from triptych.backends.oneflow import layers

    found: Found = {}
    group, rng = ranks.replicas, np.random.default_rng(5)
    for shape in ((8, 6), (8, 6, 3, 5)):
        x, probe = rng.standard_normal((2, *shape)) + 3.0
        layer = layers.BatchNorm(6).to(flow.float64)
        layer.group = group
        own = slice(0, 5) if group.rank == 0 else slice(5, 8)
        leaf = flow.tensor(x[own]).requires_grad_(True)
        y = layer(leaf)
        (y * flow.tensor(probe[own])).sum().backward()
        key = f"{len(shape)}"
        found[f"{key}.y"], found[f"{key}.grad"] = y.detach().numpy(), leaf.grad.numpy()
        for name, parameter in layer.named_parameters():
            found[f"{key}.{name}"] = group.sum(parameter.grad).numpy().copy()
        for name, buffer in layer.named_buffers():
            found[f"{key}.{name}"] = buffer.numpy().copy()
    return found


def killed(ranks: Ranks) -> Found:
    """The last process is killed while the others exchange numbers for ever."""
    while True:
        if ranks.largest(0) == 0 and ranks.rank == ranks.world - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, *cases: str) -> None:
    """Computes the cases and writes them to ``<rank>.npz``."""
    world = int(os.environ["WORLD_SIZE"])
    spec = tiny_spec(parallel=GRID[world])
    ranks = backends.load("oneflow").join(spec)
    found = {
        f"{case}.{name}": array for case in cases for name, array in globals()[case](ranks).items()
    }
    np.savez(folder / f"{ranks.rank}.npz", **found)
    ranks.close()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), *sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # else OneFlow would wait for the other processes
