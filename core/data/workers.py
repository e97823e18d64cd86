"""Loads numbered batches in worker processes, in order, through shared memory.

The workers are plain subprocesses. Those of ``multiprocessing`` would run the user's main script,
and with it import a framework; and a killed process would leave named shared memory behind. Here
the memory has no name, and a worker ends when its pipe closes. So nothing outlives this process,
however it ends.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack
from math import prod
from multiprocessing import Pipe
from types import TracebackType
from typing import TypeVar

import numpy as np

from triptych.core.data.jobs import Filled, Job, Planes
from triptych.core.data.worker import Reply, Task, shared_planes
from triptych.core.errors import UserError
from triptych.core.machine.resources import free_memory
from triptych.core.machine.signals import held_back

T = TypeVar("T")

_START = (
    "import sys; sys.path[:] = sys.argv[4:]; "
    "from triptych.core.data.worker import main; main(*map(int, sys.argv[1:4]))"
)
SHARE = 0.5
"""Largest share of the free memory for the batches that are kept ready."""
# One thread per process: threads of several workers would compete for the cores.
_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def load(
    job: Job,
    numbers: range,
    workers: int,
    prefetch: int,
    finish: Callable[[Planes, Filled], T],
) -> Generator[T, None, None]:
    """The batches ``numbers`` of a job, in order.

    Args:
        workers: number of worker processes; 0: this process loads. The batches do not depend on it.
        prefetch: most batches that each worker keeps ready. They are fewer if the job has fewer, or
            if they would fill more than ``SHARE`` of the free memory.
        finish: (pixels, rest of the batch) -> result. The pixels are overwritten after the call.

    Raises:
        UserError: the job failed, or a worker could not start or died.
    """
    if not workers:
        planes = np.empty(job.shape, np.uint8)
        for number in numbers:
            yield finish(planes, job.fill(number, planes))
        return
    with ExitStack() as stack:
        team = _team(stack, job, min(workers, len(numbers)), prefetch, len(numbers))
        for place, worker in enumerate(team):
            worker.start((job, numbers[place :: len(team)], len(worker.planes)))
        # The workers take turns.
        for place in range(len(numbers)):
            worker = team[place % len(team)]
            turn = place // len(team)
            slots = len(worker.planes)
            result = finish(worker.planes[turn % slots], worker.receive())
            if place + len(team) * slots < len(numbers):
                worker.give_back()
            yield result


def _team(stack: ExitStack, job: Job, workers: int, prefetch: int, batches: int) -> "list[_Worker]":
    """Starts the workers, which end with ``stack``, for ``batches`` batches in all."""
    if not batches:
        return []
    size = prod(job.shape)
    shares = -(-batches // workers)
    fitting = int(free_memory() * SHARE) // (size * workers)
    slots = max(1, min(prefetch, shares, fitting))
    try:
        return [stack.enter_context(_Worker(slots, job.shape)) for _ in range(workers)]
    except OSError as error:
        raise UserError(
            f"data: cannot start {workers} workers with {slots} batches of {size} bytes each "
            f"({error.strerror}); lower data.workers, data.prefetch or train.batch_size"
        ) from error


class _Worker:
    """One process, its pipe and its slots of shared memory."""

    def __init__(self, slots: int, shape: tuple[int, ...]) -> None:
        """Starts the process. Each slot holds the pixels of one batch, of shape ``shape``."""
        memory = _anonymous_file(slots * prod(shape))
        self._pipe, theirs = Pipe()
        handed = (theirs.fileno(), memory)
        try:
            self.planes: Planes = shared_planes(memory, slots, shape)
            # Signals reach every process of a terminal or a job. This one saves its state and
            # leaves, and needs its workers until then.
            with held_back():
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START, *map(str, (*handed, os.getpid())), *sys.path],
                    stdin=subprocess.DEVNULL,
                    pass_fds=handed,
                    env={**os.environ, **_THREADS},
                )
        finally:
            os.close(memory)
            # With this copy closed, the pipe ends with the worker process.
            theirs.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The worker holds nothing to save, so nothing waits for the end of its batch.
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def start(self, task: Task) -> None:
        """Sends the worker its task."""
        try:
            self._pipe.send(task)
        except ConnectionError as error:
            raise self._died() from error

    def give_back(self) -> None:
        """Lets the worker overwrite the slot of the oldest batch received."""
        try:
            self._pipe.send_bytes(b"")
        except ConnectionError as error:
            raise self._died() from error

    def receive(self) -> Filled:
        """Waits for the next batch."""
        try:
            reply: Reply = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise self._died() from error
        if isinstance(reply, UserError):
            raise reply
        return reply

    def _died(self) -> UserError:
        status = self._process.wait()
        if status >= 0:
            how = f"stopped with status {status}; its own message is above"
        else:
            how = f"was killed by {signal.Signals(-status).name}"
            if -status in (signal.SIGKILL, signal.SIGBUS):
                how += ", as happens when memory runs out; lower data.workers or data.prefetch"
        return UserError(f"data: worker process {self._process.pid} {how}")


def _anonymous_file(size: int) -> int:
    """File descriptor of ``size`` bytes of memory that has no path."""
    if hasattr(os, "memfd_create"):  # Linux; unlike /dev/shm never a small mount in a container
        descriptor = os.memfd_create("triptych")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size)
    return descriptor
