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
from functools import cache
from io import StringIO
from typing import Any

import paddle.distributed as dist
from paddle.base import core as native

from triptych.core.errors import UserError
from triptych.core.machine.lifeline import GRACE
from triptych.core.machine.signals import held_back

ARRIVED = "triptych/arrived"
"""Key of the store: number of arrivals at ``Link.meet``."""
BROKEN = (RuntimeError, ValueError)
"""What Paddle raises for a broken connection: of a group, or to the store."""


@cache
def connected() -> "Link":
    """The connection of this process, which lasts until the process ends."""
    return Link()


class Link:
    """Connects this process with the others that Paddle's launcher has started.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        host: name or address of the machine of the first process.

    Raises:
        UserError: the port of the store is in use.
    """

    def __init__(self) -> None:
        self.host, port = _address()
        if dist.get_rank() == 0:
            _check_free(port)
        # Paddle lists its settings on stderr.
        with redirect_stderr(StringIO()):
            dist.init_parallel_env()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._store = native.create_or_get_global_tcp_store()
        self._connections = _connections(port)
        self._meetings = 0
        self._groups: dict[tuple[int, ...], Any] = {tuple(range(self.world)): None}

    def groups(self, members: Sequence[Sequence[int]]) -> list[Any]:
        """Makes groups of processes, one after the other. All processes call this together.

        Gloo mixes up the addresses of groups that are made at the same time, even if they have no
        process in common. The connection to the store stays slow meanwhile, for the same reason.

        Args:
            members: the numbers of each group's processes.

        Returns:
            Paddle's groups; None: all processes.

        Raises:
            UserError: a process is gone.
        """
        self._hasten(False)
        for numbers in map(tuple, members):
            if numbers not in self._groups:
                try:
                    dist.barrier()
                    self._groups[numbers] = dist.new_group(list(numbers))
                    dist.barrier()
                except BROKEN as error:
                    reason = str(error).partition("\n")[0]
                    raise UserError(
                        f"process {self.rank} of {self.world}: cannot connect to the others "
                        f"({reason}); start the run again"
                    ) from error
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
        """Waits until all processes are here, without a limit."""
        self._meetings += 1
        begun = time.monotonic()
        with watched():
            arrived = self._arrive(1)
            while arrived < self._meetings * self.world:
                time.sleep(min((time.monotonic() - begun) / 4, 0.1))
                arrived = self._arrive(0)

    def _arrive(self, times: int) -> int:
        """Adds to the arrivals. Returns their number."""
        # Paddle takes an answer that a signal interrupts for a broken connection.
        with held_back():
            return int(self._store.add(ARRIVED, times))


@contextmanager
def watched() -> Iterator[None]:
    """Leaves it to ``core.machine.lifeline`` to end this process if another one is gone.

    Paddle raises an error then, on every process that is left. One line is enough.
    """
    try:
        yield
    except BROKEN:
        time.sleep(2 * GRACE)
        raise


def _address() -> tuple[str, int]:
    """Host and port of the store."""
    variables = os.environ
    text = variables.get("PADDLE_MASTER") or variables["PADDLE_TRAINER_ENDPOINTS"].split(",")[0]
    if variables.get("MASTER_ADDR") and variables.get("MASTER_PORT"):  # Paddle prefers these
        text = f"{variables['MASTER_ADDR']}:{variables['MASTER_PORT']}"
    host, _, port = text.rpartition(":")
    return host, int(port)


def _check_free(port: int) -> None:
    """Raises UserError if another program listens at a port. Paddle would abort the process."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(
            f"port {port}: {error.strerror}; free it, or give the launcher another --master"
        ) from error


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
