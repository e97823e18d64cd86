"""What a launcher gives to each process of a run, in environment variables."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from triptych.core.errors import UserError


class Variables(NamedTuple):
    """Names of the variables of a kind of launcher."""

    launchers: str
    """The launchers that set them."""
    world: str
    rank: str
    local_rank: str
    local_world: str
    others: tuple[str, ...]
    """Further variables: where the processes meet."""


COMMON = Variables(
    "torchrun or oneflow.distributed.launch",
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    ("MASTER_ADDR", "MASTER_PORT"),
)
PADDLE = Variables(
    "paddle.distributed.launch",
    "PADDLE_TRAINERS_NUM",
    "PADDLE_TRAINER_ID",
    "PADDLE_RANK_IN_NODE",
    "PADDLE_LOCAL_SIZE",
    ("PADDLE_MASTER", "PADDLE_CURRENT_ENDPOINT"),
)
ENDPOINTS = "PADDLE_TRAINER_ENDPOINTS"
"""The variable of Paddle's launcher that has the addresses of all processes."""
TORCHRUN = "TORCHELASTIC_RUN_ID"
"""A variable that only ``torchrun`` sets."""
PATIENCE = 5.0
"""Seconds in which a launcher ends all processes after the end of one."""
LONG = 10.0
"""Seconds after which a process that waits for the others says so."""


@dataclass(frozen=True)
class Launched:
    """The place of this process among those that a launcher has started.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        local_rank: number of this process among those of its machine, from 0.
        local_world: number of processes of this machine; of all, if the launcher does not say it.
        variables: names of the variables that say so; None: there are none.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    variables: Variables | None = None


def launched() -> Launched:
    """The place of this process. Without a launcher it is the only one.

    Raises:
        UserError: a variable is not a number, or the numbers do not fit each other.
    """
    for variables in (COMMON, PADDLE):
        world = _number(variables.world, 1)
        if world > 1:
            rank, local_rank = (_number(name, 0) for name in (variables.rank, variables.local_rank))
            if rank >= world:
                raise UserError(
                    f"{variables.rank}={rank}: {variables.world} is {world}, so expected a number "
                    f"below it; start the processes with {variables.launchers}"
                )
            local_world = _number(variables.local_world, world)
            return Launched(rank, world, local_rank, local_world, variables)
    return Launched()


def forget() -> None:
    """Removes the variables of all launchers: with them OneFlow waits for others at its import."""
    for variables in (COMMON, PADDLE):
        for name in (name for group in variables[1:] for name in _names(group)):
            os.environ.pop(name, None)


def facts() -> dict[str, Any] | None:
    """What a launcher has given to this process, as plain data; None without a launcher.

    Raises:
        UserError: as in ``launched``.
    """
    place = launched()
    if place.variables is None:
        return None
    world, *names = (name for group in place.variables[1:] for name in _names(group))
    given = {name: os.environ[name] for name in (world, *names) if name in os.environ}
    torchrun = place.variables is COMMON and TORCHRUN in os.environ
    return {
        "launcher": "torchrun" if torchrun else place.variables.launchers,
        "host": socket.gethostname(),
        "rank": place.rank,
        "world": place.world,
        "local_rank": place.local_rank,
        "local_world": place.local_world,
        "variables": given,
    }


def render(given: Mapping[str, Any]) -> str:
    """``facts`` as a line for a terminal."""
    variables = " ".join(f"{name}={value}" for name, value in given["variables"].items())
    return (
        f"launcher  rank {given['rank']} of {given['world']}, {given['local_rank']} of "
        f"{given['local_world']} on {given['host']}, by {given['launcher']}: {variables}"
    )


def _names(group: str | tuple[str, ...]) -> tuple[str, ...]:
    return (group,) if isinstance(group, str) else group


def _number(name: str, otherwise: int) -> int:
    """The value of a variable; ``otherwise`` if it is not set or empty."""
    text = os.environ.get(name) or str(otherwise)
    if not text.isdecimal():
        raise UserError(f"{name}={text}: expected a number; unset it, or let a launcher set it")
    return int(text)


def check_launcher(backend: str, place: Launched) -> None:
    """Raises UserError if several processes were started by another framework's launcher.

    Args:
        backend: a backend's name.
    """
    if place.variables is None:
        return
    wanted = {"torch": "torchrun", "oneflow": "python -m oneflow.distributed.launch"}.get(
        backend, "python -m paddle.distributed.launch"
    )
    # torchrun itself listens at the port at which OneFlow's first process would.
    torchrun = place.variables is COMMON and TORCHRUN in os.environ
    if (place.variables is PADDLE) != (backend == "paddle") or (torchrun and backend != "torch"):
        found = "torchrun" if torchrun else place.variables.launchers
        raise UserError(
            f"backend {backend}: the {place.world} processes were started by {found}; start them "
            f"with {wanted}"
        )


def check_meeting(place: Launched) -> None:
    """Raises UserError unless the variables say where several processes meet."""
    variables = place.variables or COMMON
    remedy = f"start the processes with {variables.launchers}"
    if variables is COMMON:
        address, port = (os.environ.get(name, "") for name in variables.others)
        if not address:
            raise UserError(f"MASTER_ADDR: not set, for {place.world} processes; {remedy}")
        if not _is_port(port):
            raise UserError(f"MASTER_PORT={port}: expected the number of a port; {remedy}")
        return
    given = os.environ.get(ENDPOINTS, "")
    ends = given.split(",")
    if len(ends) != place.world or not all(map(_has_port, ends)):
        raise UserError(
            f"{ENDPOINTS}={given}: expected host:port of each of {place.world} processes; {remedy}"
        )
    master = os.environ.get("PADDLE_MASTER") or ends[0]
    if not _has_port(master):
        raise UserError(f"PADDLE_MASTER={master}: expected host:port; {remedy}")


def _has_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and _is_port(port)


def waiting(place: Launched) -> str:
    """What a process says that waits for the others; only the first process of a machine does."""
    variables = place.variables or COMMON
    given = (f"{name}={os.environ[name]}" for name in variables.others if name in os.environ)
    others = f"waiting for all {place.world} processes to meet ({', '.join(given)})"
    return "" if place.local_rank else others


@contextmanager
def told_after(seconds: float, text: str) -> Iterator[None]:
    """Prints a text on standard error if the block takes longer. An empty text is not printed."""
    timer = threading.Timer(seconds, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    if text:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _is_port(text: str) -> bool:
    return text.isdecimal() and 0 < int(text) < 2**16


@contextmanager
def once_per_machine() -> Iterator[None]:
    """An error in the block, which comes before the processes meet, is told once on each machine.

    The first process of a machine tells it at once. Its launcher then ends the other processes. One
    that is still there after ``PATIENCE`` has an error of its own, and tells that.

    Raises:
        UserError: as raised in the block.
    """
    try:
        yield
    except UserError:
        if launched().local_rank:
            time.sleep(PATIENCE)
        raise
