"""Two processes that train together: the command line on the NumPy engine, joined by a pipe."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from support.double import TINY, ahead
from support.processes import SILENT, Mesh, PipeRanks, fork

from triptych import backends
from triptych.core import cli, launch
from triptych.core.commands import train
from triptych.core.contracts import Ranks
from triptych.core.machine import launchers

SHORT = (
    *TINY,
    "train.batch_size=4",
    "train.steps=6",
    "checkpoint.every=2",
    "log.every=1",
    "optim.warmup_steps=1",
)

Change = Callable[[Ranks], None]


@dataclass(frozen=True)
class Left:
    """What one process has left: its exit status and what it has said."""

    status: int | None
    out: str
    err: str


def train_on_two(
    folder: Path,
    outputs: Sequence[Path],
    *overrides: str,
    change: Change = lambda ranks: None,
    resume: str | None = None,
) -> list[Left]:
    """Runs ``train`` on two processes to their end.

    Args:
        folder: takes what they say.
        outputs: the run's folder as each of them sees it.
        change: called in each process before it begins.
    """
    arguments = ["train", "-c", "moco_v3/digits", "--backend", "torch"]
    arguments += ["--resume", resume] if resume else []
    processes = fork(2, _run, folder, outputs, [*arguments, "-o", *SHORT, *overrides], change)
    for process in processes:
        process.join(2 * SILENT)
        process.kill()
        process.join()
    texts = [[(folder / f"{rank}.{name}").read_text() for name in STREAMS] for rank in (0, 1)]
    return [Left(p.exitcode, *said) for p, said in zip(processes, texts, strict=True)]


STREAMS = ("out", "err")


def _run(
    mesh: Mesh, folder: Path, outputs: Sequence[Path], arguments: list[str], change: Change
) -> None:
    rank = mesh.rank
    for number, name in enumerate(STREAMS, 1):
        file = (folder / f"{rank}.{name}").open("w")
        os.dup2(file.fileno(), number)
        setattr(sys, f"std{name}", file)
    # Without "parallel.data=2" each process has the whole batch.
    ranks = PipeRanks(mesh, copies=1 + ("parallel.data=2" in arguments))
    backends.load = lambda name: ahead
    train.join = lambda *_: ranks
    train.launched = lambda: SimpleNamespace(rank=rank)
    launchers.launched = lambda: SimpleNamespace(local_rank=rank)
    launch.check_supported = lambda *_: None
    launch.time = SimpleNamespace(sleep=lambda seconds: sys.exit(2))  # a launcher ends it meanwhile
    change(ranks)
    sys.exit(cli.main([*arguments, "--output", str(outputs[rank])]))
