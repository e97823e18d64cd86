"""The processes of a run on Paddle: their groups, what they exchange, and how they wait.

Paddle's launcher starts them, and ``paddle.distributed`` connects them: by NCCL on GPUs, by gloo on
CPUs.
"""

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor

from triptych.backends.paddle.link import Link, connected, watched
from triptych.core import contracts
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Context, Ranks
from triptych.core.machine.devices import wanted_device
from triptych.core.machine.lifeline import Lifeline, follow_launcher
from triptych.core.parallel.degrees import Degrees, norm_groups

ALONE = contracts.Group()


def context(device: str, precision: str, ranks: Ranks) -> Context:
    """The context of a run. A single process waits for each step on the CPU."""
    return Context(device, precision, runs_ahead=device != "cpu" or ranks.world > 1)


class Group(contracts.Group):
    """Implements ``core.contracts.Group``.

    Args:
        members: numbers of the processes, in the order of their ranks in the group.
        native: the group of Paddle; None: all processes.
        link: connects all processes.
    """

    def __init__(self, members: Sequence[int], native: Any, link: Link) -> None:
        self.members, self.native, self.link = tuple(members), native, link
        self.rank, self.count = self.members.index(link.rank), len(members)

    def sum(self, x: Tensor) -> Tensor:
        """See ``core.contracts.Group``."""
        return self.sum_(x.detach().clone().contiguous())

    def sum_(self, x: Tensor) -> Tensor:
        """``sum`` in place of ``x``, which has no gaps in memory."""
        with watched():
            dist.all_reduce(x, group=self.native)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """See ``core.contracts.Group``."""
        parts: list[Tensor] = []
        with watched():
            dist.all_gather(parts, x.detach().contiguous(), group=self.native)
        return paddle.concat(parts)

    def broadcast(self, x: Tensor, source: int = 0) -> None:
        """See ``core.contracts.Group``. source: rank of the process whose tensor all get."""
        with watched():
            dist.broadcast(x, src=self.members[source], group=self.native)

    def send(self, x: Tensor, target: int) -> None:
        """Sends a tensor to a neighbour. target: rank of the process."""
        with watched():
            dist.send(x.contiguous(), dst=self.members[target], group=self._pair(target))

    def receive(self, x: Tensor, source: int) -> None:
        """Receives ``x`` in place, of the shape and type that were sent. source: as ``target``."""
        with watched():
            dist.recv(x, src=self.members[source], group=self._pair(source))

    def _pair(self, other: int) -> Any:
        """The group of Paddle of this process and a neighbour.

        Gloo numbers the messages of a group by the calls of each process, which agree for two
        processes only.
        """
        first = min(self.rank, other)
        return self.link.groups([self.members[first : first + 2]])[0]


class Processes(Ranks):
    """Implements ``core.contracts.Ranks`` with Paddle's groups of processes.

    Raises:
        OSError: the first process cannot be reached.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.link = connected()
        self.rank, self.world = self.link.rank, self.link.world
        degrees = Degrees.of(spec)
        self.replicas = self._group(degrees.groups("data"))
        self.tensor = self._group(degrees.groups("tensor"))
        stages = degrees.groups("pipeline")
        self.pipeline = self._group(stages)
        self.link.groups([pair for members in stages for pair in pairwise(members)])
        self.norms = self._group(norm_groups(spec))
        self._lifeline = Lifeline(self, self.link.host)

    def largest(self, value: int) -> int:
        """See ``core.contracts.Ranks``."""
        self.link.meet()
        highest = paddle.to_tensor([value], "int64")
        with watched():
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return int(highest)

    def close(self) -> None:
        """See ``core.contracts.Ranks``."""
        self._lifeline.close()

    def _group(self, groups: Sequence[Sequence[int]]) -> contracts.Group:
        """The group of this process among disjoint groups that all processes make together."""
        if len(groups) == self.world:
            return ALONE
        made = zip(groups, self.link.groups(groups), strict=True)
        own = next(pair for pair in made if self.rank in pair[0])
        return Group(*own, self.link)


def join(spec: RunSpec) -> Processes:
    """Meets the other processes that a launcher has started.

    Raises:
        OSError: the first process cannot be reached.
    """
    follow_launcher()
    if wanted_device(spec) == "cpu" or not paddle.device.cuda.device_count():
        # Of its own accord, a build for GPUs would choose NCCL.
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    return Processes(spec)
