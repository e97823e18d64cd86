"""The connection of all processes of a run: how they wait for each other, and how they end.

Gloo gives up when a process is 30 seconds late, whatever the settings say. Therefore processes that
may be late, since one of them reads data or writes a checkpoint, wait at Paddle's store instead.
"""

import os
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from functools import cache, cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import paddle.distributed as dist
from paddle.base import core as native

from triptych.core.errors import UserError

ARRIVED, NOTICED, PLACE = "triptych/arrived", "triptych/noticed", "triptych/place/"
"""Keys of the store: number of arrivals at ``Link.meet``; number of processes that miss another
one; where each process is."""
PATIENCE = 1.0
"""Seconds after which a waiting process looks whether the others are alive."""
BROKEN = (RuntimeError, ValueError)
"""What Paddle raises for a broken connection: of a group, or to the store."""
LATER = 0.3
"""Seconds by which the other processes let the main one speak first. Only its output is shown."""


@cache
def connected() -> "Link":
    """The connection of this process, which lasts until the process ends."""
    return Link()


class Link:
    """Connects this process with the others that Paddle's launcher has started.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
    """

    def __init__(self) -> None:
        # Paddle lists its settings on stderr.
        with redirect_stderr(StringIO()):
            dist.init_parallel_env()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._store = native.create_or_get_global_tcp_store()
        self._store.set(f"{PLACE}{self.rank}", _place(os.getpid()))
        self._connections = _connections(_port())
        self._meetings = 0
        self._groups: dict[tuple[int, ...], Any] = {}
        self._peers: dict[int, str] = {}

    def groups(self, members: Sequence[Sequence[int]]) -> list[Any]:
        """Makes groups of processes, one after the other. All processes call this together.

        Gloo mixes up the addresses of groups that are made at the same time, even if they have no
        process in common. The connection to the store stays slow meanwhile, for the same reason.

        Args:
            members: the numbers of each group's processes.

        Returns:
            Paddle's groups.
        """
        self._hasten(False)
        for numbers in map(tuple, members):
            if numbers not in self._groups:
                with self.watched():
                    dist.barrier()
                    self._groups[numbers] = dist.new_group(list(numbers))
                    dist.barrier()
        self._hasten(True)
        return [self._groups[tuple(numbers)] for numbers in members]

    def _hasten(self, flag: bool) -> None:
        """Sets whether small messages to the store are sent at once (TCP_NODELAY).

        Paddle sends a request in several pieces. Without the option, the second piece waits 40 ms
        for the answer to the first.
        """
        for connection in self._connections:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, flag)

    def meet(self) -> None:
        """Waits until all processes are here, without a limit.

        Raises:
            UserError: another process of this machine has ended.
        """
        self._meetings += 1
        begun, looked = time.monotonic(), 0.0
        with self.watched():
            arrived = self._store.add(ARRIVED, 1)
            while arrived < self._meetings * self.world:
                waited = time.monotonic() - begun
                if waited - looked > PATIENCE:
                    looked = waited
                    self._check_alive()
                time.sleep(min(waited / 4, 0.1))
                arrived = self._store.add(ARRIVED, 0)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns a broken connection in the block into an error of one line.

        Raises:
            UserError: a connection is broken. One process has the text, the others an empty one.
        """
        try:
            yield
        except BROKEN as error:
            # A later call has the same message: its error may replace that of the first call.
            raise UserError(self._notice) from error

    @cached_property
    def _notice(self) -> str:
        """The message of a process that misses another one: empty if one has given it already."""
        if self.rank:
            time.sleep(LATER)
        try:
            first = self._store.add(NOTICED, 1) == 1
        except BROKEN:
            first = self.rank == 1  # the store has ended with process 0
        if not first:
            return ""
        return (
            f"process {self.rank} of {self.world}: another process has ended, or does not answer; "
            "see its output, and go on with --resume auto"
        )

    def _check_alive(self) -> None:
        """Raises RuntimeError if a process of this machine has ended."""
        if not self._peers:
            places = {r: self._store.get(f"{PLACE}{r}").decode() for r in range(self.world)}
            machine = _place("")
            self._peers = {r: p[len(machine) :] for r, p in places.items() if p.startswith(machine)}
        for rank, number in self._peers.items():
            if _has_ended(number):
                raise RuntimeError(f"process {rank} has ended")


def _port() -> int:
    """The port of the store."""
    variables = ("MASTER_PORT", "PADDLE_MASTER", "PADDLE_TRAINER_ENDPOINTS")
    text = next(os.environ[name] for name in variables if os.environ.get(name))
    return int(text.split(",")[0].rpartition(":")[2])


def _connections(port: int) -> list[socket.socket]:
    """The connections of this process to a port, which Paddle does not give."""
    found = []
    with suppress(FileNotFoundError):  # only Linux has the folder
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the file is closed by now, or no connection
                if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                    connection = socket.socket(fileno=os.dup(int(name)))
                    if connection.getpeername()[1] == port:
                        found.append(connection)
    return found


def _place(process: object) -> str:
    """The machine, the name space of its process numbers, and a number in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {process}"
    except OSError:
        return f"{socket.gethostname()} {process}"


def _has_ended(process: str) -> bool:
    """Whether a process of this machine has ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return Path("/proc/self").exists()
    return state in "ZX"
