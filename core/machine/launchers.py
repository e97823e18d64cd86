"""What a launcher gives to each process of a run, in environment variables."""

import os
from dataclasses import dataclass
from typing import NamedTuple

from triptych.core.errors import UserError


class Variables(NamedTuple):
    """Names of the variables of a kind of launcher."""

    launchers: str
    """The launchers that set them."""
    world: str
    rank: str
    local_rank: str


COMMON = Variables("torchrun or oneflow.distributed.launch", "WORLD_SIZE", "RANK", "LOCAL_RANK")
PADDLE = Variables(
    "paddle.distributed.launch", "PADDLE_TRAINERS_NUM", "PADDLE_TRAINER_ID", "PADDLE_RANK_IN_NODE"
)
TORCHRUN = "TORCHELASTIC_RUN_ID"
"""A variable that only ``torchrun`` sets."""


@dataclass(frozen=True)
class Launched:
    """The place of this process among those that a launcher has started.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        local_rank: number of this process among those of its machine, from 0.
        variables: names of the variables that say so; None: there are none.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
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
            return Launched(rank, world, local_rank, variables)
    return Launched()


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
