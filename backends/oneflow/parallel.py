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
        self._axis, self._places = axis, [flow.sbp.split(each) for each in range(len(shape))]
        self._ranks = np.arange(math.prod(shape)).reshape(*shape).tolist()

    def sum(self, x: Tensor) -> Tensor:
        """See ``core.contracts.Group``."""
        return self._joined(x, flow.sbp.partial_sum)

    def gather(self, x: Tensor) -> Tensor:
        """See ``core.contracts.Group``."""
        parts = self._joined(x, flow.sbp.split(self._axis))
        return parts.reshape(self.count * len(x), *x.shape[1:])

    def broadcast(self, x: Tensor) -> None:
        """See ``core.contracts.Group``."""
        x.copy_(self._joined(x, flow.sbp.split(self._axis)).reshape(self.count, *x.shape)[0])

    @flow.no_grad()
    def _joined(self, x: Tensor, parts: flow.sbp.sbp) -> Tensor:
        """What the group's tensors are together.

        Args:
            parts: what the tensors of the processes are along the axis of the group.

        Returns:
            The sum, in the shape of ``x``; or the stack (count, ...) of split tensors.
        """
        # The tensor gets an axis of length 1 for each axis of the grid, to be divided along it.
        before, after = list(self._places), list(self._places)
        before[self._axis], after[self._axis] = parts, flow.sbp.broadcast
        local = x.reshape(*[1] * len(before), *x.shape)
        # The check of the metadata would be an exchange of all processes.
        grid = flow.placement(x.device.type, self._ranks)
        whole = local.to_global(placement=grid, sbp=before, check_meta=False)
        joined = whole.to_global(sbp=after, check_meta=False).to_local()
        stacked = joined.shape[self._axis]
        return joined.reshape(*x.shape) if stacked == 1 else joined.reshape(stacked, *x.shape)


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
