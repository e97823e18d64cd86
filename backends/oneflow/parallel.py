"""The processes of a run over OneFlow's global tensors, and the context of an engine."""

import math
import os
from collections.abc import Sequence

import numpy as np
import oneflow as flow
from oneflow import Tensor

from triptych.core import contracts
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Context, Ranks
from triptych.core.machine.lifeline import Lifeline
from triptych.core.parallel.degrees import Degrees


def context(device: str, precision: str, ranks: Ranks) -> Context:
    """The context of a run. On the CPU, the host of a single process waits for each step."""
    return Context(device, precision, runs_ahead=device != "cpu" or ranks.world > 1)


class Group(contracts.Group):
    """Processes that exchange tensors (see ``core.contracts.Group``).

    OneFlow has no groups of processes. It exchanges along one axis of a grid of all processes: a
    global tensor is divided along every axis, and partial sums or parts become a whole along one of
    them. The groups of the grid do not wait for each other.

    Args:
        shape: extents of the grid. Its last axis has contiguous processes.
        axis: the processes of a group differ along this axis.
    """

    def __init__(self, shape: Sequence[int], axis: int) -> None:
        own = np.unravel_index(flow.env.get_rank(), shape)
        self.rank, self.count = int(own[axis]), shape[axis]
        self._axis, self._axes = axis, len(shape)
        self._stride = math.prod(shape[axis + 1 :])
        self._first = flow.env.get_rank() - self.rank * self._stride
        self._ranks = np.arange(math.prod(shape)).reshape(*shape).tolist()

    def sum(self, x: Tensor) -> Tensor:
        """See ``core.contracts.Group``."""
        return self._exchange(x[None], flow.sbp.partial_sum, flow.sbp.broadcast)[0]

    def sum_part(self, x: Tensor) -> Tensor:
        """This process's part of the sum. x: (count * N,); the result is (N,)."""
        parts = x.reshape(self.count, -1)
        return self._exchange(parts, flow.sbp.partial_sum, flow.sbp.split(self._axis))[0]

    def gather(self, x: Tensor) -> Tensor:
        """See ``core.contracts.Group``."""
        stack = self._exchange(x[None], flow.sbp.split(self._axis), flow.sbp.broadcast)
        return stack.reshape(self.count * len(x), *x.shape[1:])

    def broadcast(self, x: Tensor) -> None:
        """See ``core.contracts.Group``."""
        x.copy_(self._exchange(x[None], flow.sbp.split(self._axis), flow.sbp.broadcast)[0])

    def send(self, x: Tensor, target: int) -> None:
        """Sends a tensor to a process. target: rank of the process."""
        flow.comm.send(x.contiguous(), self._first + target * self._stride, False)

    def receive(self, shape: tuple[int, ...], like: Tensor, source: int) -> Tensor:
        """The tensor that a process sends.

        Args:
            shape: of the tensor.
            like: a tensor of its type and device.
            source: rank of the process.
        """
        place = self._first + source * self._stride
        return flow.comm.recv(place, flow.Size(shape), like.dtype, like.device)

    @flow.no_grad()
    def _exchange(self, x: Tensor, before: flow.sbp.sbp, after: flow.sbp.sbp) -> Tensor:
        """What this process has of the group's common tensor, afterwards.

        Args:
            x: (rows, ...), what this process has before.
            before: what the tensors are along the axis of the group: parts, by rows, or summands.
            after: likewise, for the result.
        """
        # The tensor gets an axis of length 1 for each axis of the grid, to be divided along it.
        places, axis = [flow.sbp.split(each) for each in range(self._axes)], self._axis
        ones = [1] * axis, [1] * (self._axes - axis - 1)
        local = x.reshape(*ones[0], len(x), *ones[1], *x.shape[1:])
        grid = flow.placement(x.device.type, self._ranks)
        places[axis] = before
        # The check of the metadata would be an exchange of all processes.
        whole = local.to_global(placement=grid, sbp=places, check_meta=False)
        places[axis] = after
        local = whole.to_global(sbp=places, check_meta=False).to_local()
        return local.reshape(local.shape[axis], *x.shape[1:])


class Processes(Ranks):
    """The processes that a launcher has started, as a grid of ``core.parallel.degrees``.

    OneFlow gives no exchange up: a process would wait for ever for one that is gone.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.rank, self.world = flow.env.get_rank(), flow.env.get_world_size()
        degrees = Degrees.of(spec)
        grid = (degrees.pipeline, degrees.data, degrees.tensor)
        self._all = Group((self.world,), 0)
        self.pipeline, self.replicas, self.tensor = (
            _group(grid, axis) for axis in range(len(grid))
        )
        # Neighbouring copies share the statistics of a virtual rank.
        virtual = min(spec.batch_norm.virtual_ranks, degrees.data)
        parts = (degrees.pipeline, virtual, degrees.data // virtual, degrees.tensor)
        self.norms = _group(parts, 2)
        self._lifeline = Lifeline(self, os.environ["MASTER_ADDR"])

    def largest(self, value: int) -> int:
        """See ``core.contracts.Ranks``."""
        return int(self._all.gather(flow.tensor([value], dtype=flow.int64)).numpy().max())

    def close(self) -> None:
        """See ``core.contracts.Ranks``."""
        self._lifeline.close()


def _group(shape: Sequence[int], axis: int) -> contracts.Group:
    return Group(shape, axis) if shape[axis] > 1 else contracts.Group()


def join(spec: RunSpec) -> Processes:
    """The processes that the launcher has started, of which this is one. It waits for all of them.

    Raises:
        OSError: the first process cannot be reached.
    """
    return Processes(spec)
