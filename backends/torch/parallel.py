"""The processes of a run over ``torch.distributed``: NCCL on CUDA devices, Gloo on the CPU."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych.core import contracts
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Context, Ranks
from triptych.core.errors import UserError
from triptych.core.machine.lifeline import GRACE, Lifeline, follow_launcher
from triptych.core.parallel.degrees import Degrees, norm_groups

PATIENCE = timedelta(minutes=30)
"""How long a process waits for another one. The longest wait is that for the save of a state."""
BUCKET = {"cuda": 1 << 25, "cpu": 1 << 23}
"""Bytes of gradients that are exchanged at once. A bucket travels while the next one is packed.

On the CPU, glibc gives 32 MiB and more back to the system each time they are freed, so that the
pages of larger buckets would have to be made anew in each step.
"""


def context(device: str, precision: str, ranks: Ranks) -> Context:
    """The context of a run. On the CPU, the host of a single process waits for each step."""
    return Context(device, precision, runs_ahead=device != "cpu" or ranks.world > 1)


@contextmanager
def _watched() -> Iterator[None]:
    """Leaves it to ``Lifeline`` to end this process if another one is gone.

    Gloo raises an error then, on every process that is left. One line is enough.
    """
    try:
        yield
    except RuntimeError:
        time.sleep(2 * GRACE)
        raise


class Group(contracts.Group):
    """Processes that exchange tensors (see ``core.contracts.Group``).

    Args:
        group: as ``torch.distributed`` knows it; None: all processes.
        members: the numbers of its processes, in order.
    """

    def __init__(self, group: Any, members: Sequence[int]) -> None:
        self._group = group
        self.rank, self.count = members.index(dist.get_rank()), len(members)

    @_watched()
    def sum(self, x: Tensor) -> Tensor:
        """See ``core.contracts.Group``."""
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        return total

    @_watched()
    def gather(self, x: Tensor) -> Tensor:
        """See ``core.contracts.Group``."""
        rows = x.detach().contiguous()
        gathered = rows.new_empty((self.count * len(rows), *rows.shape[1:]))
        # PyTorch renames the form that takes one tensor (2.14); this one keeps its name.
        dist.all_gather(list(gathered.chunk(self.count)), rows, group=self._group)
        return gathered

    @_watched()
    def broadcast(self, x: Tensor, source: int = 0) -> None:
        """See ``core.contracts.Group``. source: rank of the process that gives ``x``."""
        given = x.contiguous()  # a convolution's weight may have its channels last
        dist.broadcast(given, group=self._group, group_src=source)
        if given is not x:
            x.copy_(given)

    @_watched()
    def send(self, x: Tensor, target: int) -> None:
        """Sends a tensor to a process. target: rank of the process."""
        dist.send(x.contiguous(), group=self._group, group_dst=target)

    @_watched()
    def receive(self, x: Tensor, source: int) -> None:
        """Receives ``x`` in place, of the shape and type that were sent. source: as ``target``."""
        dist.recv(x, group=self._group, group_src=source)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces the gradients by their sums over the group; a missing one counts as zeros."""
        self._exchange([(None, bucket) for bucket in _buckets(parameters)])

    def sum_gradients_to_owners(self, owned: Sequence[Iterable[nn.Parameter]]) -> None:
        """Gives each process the sums of the gradients of the parameters that it owns.

        Other gradients become None.

        Args:
            owned: the parameters of each process, in the order of the ranks.
        """
        self._exchange([(r, each) for r, own in enumerate(owned) for each in _buckets(own)])

    @_watched()
    def _exchange(self, buckets: Sequence[tuple[int | None, list[nn.Parameter]]]) -> None:
        """Sums the gradients of each bucket, for one process or for all."""
        sent = [(owner, bucket, *self._send(owner, bucket)) for owner, bucket in buckets]
        for owner, bucket, flat, work in sent:
            work.wait()
            if owner in (None, self.rank):
                sizes = [parameter.numel() for parameter in bucket]
                for parameter, part in zip(bucket, flat.split(sizes), strict=True):
                    parameter.grad = _like(parameter, part)

    def _send(self, owner: int | None, bucket: list[nn.Parameter]) -> tuple[Tensor, dist.Work]:
        """Takes the gradients of a bucket into one buffer, and begins to exchange it."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        for parameter in bucket:
            parameter.grad = None
        work: dist.Work | None
        if owner is None:
            work = dist.all_reduce(flat, group=self._group, async_op=True)
        else:
            work = dist.reduce(flat, group=self._group, group_dst=owner, async_op=True)
        return flat, cast(dist.Work, work)


def _like(parameter: nn.Parameter, numbers: Tensor) -> Tensor:
    """Numbers in the shape of a parameter, in its order in memory, as fused updates want it."""
    gradient = numbers.view_as(parameter)
    if parameter.is_contiguous():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, in lists of about ``BUCKET`` bytes."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(p.nbytes for p in bucket) >= BUCKET[parameter.device.type]:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


class Processes(Ranks):
    """The processes that a launcher has started, as a grid of ``core.parallel.degrees``.

    The launcher's variables say how they meet (``env://``). On CUDA devices, flags and counts are
    exchanged by the hosts: they need no wait for the device.

    Raises:
        UserError: the port at which they meet is in use.
        OSError: the first process cannot be reached.
    """

    def __init__(self, spec: RunSpec) -> None:
        follow_launcher()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except dist.DistNetworkError as error:
            reason = str(error).partition("\n")[0]
            port = os.environ["MASTER_PORT"]
            raise UserError(
                f"MASTER_PORT={port}: {reason}; give the launcher another --master_port"
            ) from error
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        degrees = Degrees.of(spec)
        self.replicas = self._group(degrees.groups("data"))
        self.tensor = self._group(degrees.groups("tensor"))
        self.pipeline = self._group(degrees.groups("pipeline"))
        self.norms = self._group(norm_groups(spec))
        self._lifeline = Lifeline(self, os.environ["MASTER_ADDR"])

    def _group(self, groups: Sequence[Sequence[int]]) -> contracts.Group:
        """The group of this process. All processes make all groups, in the same order."""
        own = contracts.Group()
        for members in groups:
            if len(members) == self.world:
                return Group(None, members)
            group = dist.new_group(list(members)) if len(members) > 1 else None
            if group is not None and self.rank in members:
                own = Group(group, members)
        return own

    @_watched()
    def largest(self, value: int) -> int:
        """See ``core.contracts.Ranks``."""
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def close(self) -> None:
        """See ``core.contracts.Ranks``."""
        self._lifeline.close()
        dist.destroy_process_group()


def join(spec: RunSpec) -> Processes:
    """Meets the other processes that a launcher has started.

    Raises:
        OSError: the first process cannot be reached.
    """
    return Processes(spec)
