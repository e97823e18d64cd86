"""Two processes that train together: the command line on the NumPy engine, joined by a pipe.

Each process is forked from the test, so what a case changes in one of them changes nothing else.
A pipe that stays silent, and ranks that wait for each other at different lines, end the test.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

from support.double import TINY, ahead

from triptych import backends
from triptych.core import cli, launch
from triptych.core.commands import train
from triptych.core.contracts import Ranks

SILENT = 30.0
"""Seconds without a word from the other process that count as a hang."""
SHORT = (
    *TINY,
    "train.batch_size=4",
    "train.steps=6",
    "checkpoint.every=2",
    "log.every=1",
    "optim.warmup_steps=1",
)

Change = Callable[[Ranks], None]


class PipeRanks(Ranks):
    """One of two processes that agree over a pipe."""

    def __init__(self, rank: int, link: Connection) -> None:
        self.rank, self.world, self._link = rank, 2, link

    def largest(self, value: int) -> int:
        """See ``Ranks``. Both processes have to be at the same lines of the program."""
        self._link.send((value, _lines()))
        if not self._link.poll(SILENT):
            raise TimeoutError(f"rank {self.rank} waits alone at {_lines()}")
        other, lines = self._link.recv()
        if lines != _lines():
            raise AssertionError(f"rank {self.rank} is at {_lines()}, the other at {lines}")
        return max(value, other)


def _lines() -> list[str]:
    """The lines of core that are being run, from the inside out."""
    found = []
    frame = sys._getframe(1)
    while frame:
        if "/core/" in frame.f_code.co_filename:
            found.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        frame = frame.f_back
    return found


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
    context = multiprocessing.get_context("fork")
    links = context.Pipe()
    processes = []
    for rank in (0, 1):
        arguments = ["train", "-c", "moco_v3/digits", "--backend", "torch"]
        arguments += ["--output", str(outputs[rank]), *(["--resume", resume] if resume else [])]
        given = (rank, links, folder, [*arguments, "-o", *SHORT, *overrides], change)
        processes.append(context.Process(target=_run, args=given))
    for process in processes:
        process.start()
    for link in links:
        link.close()
    for process in processes:
        process.join(2 * SILENT)
        process.kill()
        process.join()
    texts = [[(folder / f"{rank}.{name}").read_text() for name in STREAMS] for rank in (0, 1)]
    return [Left(p.exitcode, *said) for p, said in zip(processes, texts, strict=True)]


STREAMS = ("out", "err")


def _run(
    rank: int, links: Sequence[Connection], folder: Path, arguments: list[str], change: Change
) -> None:
    links[1 - rank].close()  # so that this process hears of the other one's end
    for number, name in enumerate(STREAMS, 1):
        file = (folder / f"{rank}.{name}").open("w")
        os.dup2(file.fileno(), number)
        setattr(sys, f"std{name}", file)
    ranks = PipeRanks(rank, links[rank])
    backends.load = lambda name: ahead
    train.join = lambda *_: ranks  # each has the whole batch
    train.launched = lambda: SimpleNamespace(rank=rank)
    launch.launched = lambda: SimpleNamespace(local_rank=rank)
    change(ranks)
    sys.exit(cli.main(arguments))
