"""Processes that train together, forked from a test and joined by pipes.

Each process is a copy of the test's, so what a case changes in one of them changes nothing else. A
pipe that stays silent, and processes that wait for each other at different lines, end the test.
"""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import combinations
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, ForkProcess
from operator import add
from typing import Any

import numpy as np

from triptych.core.contracts import Array, Group, Ranks

SILENT = 30.0
"""Seconds without a word from another process that count as a hang."""
Ends = dict[tuple[int, int], Connection]
"""(owner, other) -> the owner's end of their pipe."""


class Mesh:
    """The pipes of one process to all others.

    Attributes:
        strict: whether all processes have to exchange values at the same lines of the program.
    """

    strict = True

    def __init__(self, rank: int, world: int, ends: Ends) -> None:
        self.rank, self.world = rank, world
        self._ends = {other: end for (owner, other), end in ends.items() if owner == rank}
        for (owner, _), end in ends.items():
            if owner != rank:
                end.close()  # so that this process hears of another one's end

    def exchange(self, value: Any, members: Sequence[int]) -> list[Any]:
        """The values of some processes, of which this is one, in their order."""
        values, lines = {self.rank: value}, _lines()
        for other in members:
            if other == self.rank:
                continue
            if self.rank < other:  # so no two processes fill the pipe at the same time
                self._ends[other].send((value, lines))
            values[other], theirs = self.receive(other)
            if self.rank > other:
                self._ends[other].send((value, lines))
            meets_any = _meets_any(theirs) and _meets_any(lines)
            if self.strict and theirs != lines and not meets_any:
                raise AssertionError(f"rank {self.rank} is at {lines}, {other} at {theirs}")
        return [values[member] for member in members]

    def send(self, value: Any, other: int) -> None:
        """Sends a value to one process."""
        self._ends[other].send(value)

    def receive(self, other: int) -> Any:
        """The next value that a process has sent to this one."""
        if not self._ends[other].poll(SILENT):
            raise TimeoutError(f"rank {self.rank} waits alone at {_lines()}")
        return self._ends[other].recv()


class PipeGroup(Group):
    """Some of the processes, as one of them sees them."""

    def __init__(self, mesh: Mesh, members: Sequence[int]) -> None:
        self._mesh, self._members = mesh, list(members)
        self.rank, self.count = self._members.index(mesh.rank), len(self._members)

    def sum(self, x: Array) -> Array:
        """See ``Group``. All members add in the same order."""
        return np.array(reduce(add, self._mesh.exchange(x, self._members)))

    def gather(self, x: Array) -> Array:
        """See ``Group``."""
        return np.concatenate(self._mesh.exchange(x, self._members))

    def broadcast(self, x: Array) -> None:
        """See ``Group``."""
        x[...] = self._mesh.exchange(x, self._members)[0]


class PipeRanks(Ranks):
    """All processes. Each has the whole batch, unless there are ``copies`` that share it."""

    def __init__(self, mesh: Mesh, copies: int = 1, virtual_ranks: int = 1) -> None:
        self.rank, self.world, self.mesh = mesh.rank, mesh.world, mesh
        if copies > 1:
            self.replicas = PipeGroup(mesh, range(copies))
        if copies > virtual_ranks:
            sharing = copies // virtual_ranks
            first = mesh.rank // sharing * sharing
            self.norms = PipeGroup(mesh, range(first, first + sharing))

    def largest(self, value: int) -> int:
        """See ``Ranks``. All processes have to be at the same lines of the program."""
        return int(max(self.mesh.exchange(value, range(self.world))))


def _lines() -> list[str]:
    """The lines of core that are being run, from the inside out."""
    found = []
    frame = sys._getframe(1)
    while frame:
        if "/core/" in frame.f_code.co_filename:
            found.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        frame = frame.f_back
    return found


def _meets_any(lines: Sequence[str]) -> bool:
    """Whether the place is one that may meet others: see ``core.parallel.agreement.whole``."""
    return any(line.startswith(("whole:", "part:")) for line in lines[:2])


def fork(world: int, body: Callable[..., None], *arguments: Any) -> list[ForkProcess]:
    """Starts ``body(mesh, *arguments)`` in each of ``world`` processes."""
    context: ForkContext = multiprocessing.get_context("fork")
    ends: Ends = {}
    for pair in combinations(range(world), 2):
        ends[pair], ends[pair[::-1]] = context.Pipe()
    processes = [
        context.Process(target=_enter, args=(rank, world, ends, body, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for end in ends.values():
        end.close()
    return processes


def _enter(
    rank: int, world: int, ends: Ends, body: Callable[..., None], arguments: Sequence[Any]
) -> None:
    body(Mesh(rank, world, ends), *arguments)


def together(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(mesh, *arguments)`` returns in each of ``world`` processes."""
    results = [multiprocessing.get_context("fork").Pipe(duplex=False) for _ in range(world)]
    senders = [sender for _, sender in results]
    processes = fork(world, _answer, senders, function, arguments)
    for sender in senders:
        sender.close()
    try:
        # A process that ends without an answer has printed its error. Reading meets the end.
        return [receiver.recv() for receiver, _ in results if receiver.poll(4 * SILENT)]
    finally:
        for process in processes:
            process.join(1)
            process.kill()
            process.join()


def _answer(
    mesh: Mesh, senders: Sequence[Connection], function: Callable[..., Any], arguments: Any
) -> None:
    for rank, sender in enumerate(senders):
        if rank != mesh.rank:
            sender.close()
    senders[mesh.rank].send(function(mesh, *arguments))
