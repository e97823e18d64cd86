"""Worker processes that load numbered batches, in order, through shared memory.

Plain subprocesses, not ``multiprocessing``: its workers would run the user's main script, and with
it import a framework, and its shared memory has names that a killed process leaves behind. Here
the memory has no name, and a worker ends when its pipe closes, so nothing outlives this process,
however it ends.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from multiprocessing import Pipe
from types import TracebackType
from typing import TypeVar

import numpy as np

from triptych.core.data.jobs import Filled, Job, Planes
from triptych.core.data.worker import Reply, shared_planes
from triptych.core.errors import UserError

T = TypeVar("T")

_START = (
    "import sys; sys.path[:] = sys.argv[4:]; "
    "from triptych.core.data.worker import main; main(*map(int, sys.argv[1:4]))"
)
# One thread per process: more of them would only get in each other's way.
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
        workers: processes; 0 loads here. What is loaded does not depend on it.
        prefetch: batches kept ready by each worker.
        finish: makes the result from the pixels, which are overwritten soon after, and from what
            belongs to them.

    Raises:
        UserError: from the job, or because a worker could not start or died.
    """
    if not workers:
        planes = np.empty(job.shape, np.uint8)
        for number in numbers:
            yield finish(planes, job.fill(number, planes))
        return
    with ExitStack() as stack:
        try:
            team = [
                stack.enter_context(_Worker(prefetch, job.shape))
                for _ in range(min(workers, len(numbers)))
            ]
        except OSError as error:
            raise UserError(
                f"data: cannot start {workers} workers with {prefetch} batches each "
                f"({error.strerror}); lower data.workers or data.prefetch"
            ) from error
        for worker in team:
            worker.send((job, prefetch))
        # Batches go round the team; each worker's slots take turns.
        ahead = len(team) * prefetch
        for place, number in enumerate(numbers[:ahead]):
            team[place % len(team)].send((number, place // len(team)))
        for place in range(len(numbers)):
            worker, slot = team[place % len(team)], place // len(team) % prefetch
            result = finish(worker.planes[slot], worker.receive())
            if place + ahead < len(numbers):
                worker.send((numbers[place + ahead], slot))
            yield result


class _Worker:
    """One process, its pipe and its slots of shared memory."""

    def __init__(self, slots: int, shape: tuple[int, ...]) -> None:
        """shape: of the pixels of one batch."""
        memory = _anonymous_file(slots * prod(shape))
        self._pipe, theirs = Pipe()
        handed = (theirs.fileno(), memory)
        try:
            self.planes: Planes = shared_planes(memory, slots, shape)
            with _signals_held_back():
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START, *map(str, (*handed, os.getpid())), *sys.path],
                    stdin=subprocess.DEVNULL,
                    pass_fds=handed,
                    env={**os.environ, **_THREADS},
                )
        finally:
            os.close(memory)
            # With our copy closed, the end of the process is the end of the pipe.
            theirs.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # It holds nothing that needs care: no need to wait for the end of its batch.
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def send(self, message: object) -> None:
        """Hands over the job, then requests."""
        try:
            self._pipe.send(message)
        except ConnectionError as error:
            raise self._died() from error

    def receive(self) -> Filled:
        """Waits for the reply to the oldest request."""
        try:
            reply: Reply = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise self._died() from error
        if isinstance(reply, str):
            raise UserError(reply)
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
    """File descriptor of so many bytes of memory that no path leads to."""
    if hasattr(os, "memfd_create"):  # Linux; unlike /dev/shm never a small mount in a container
        descriptor = os.memfd_create("triptych")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size)
    return descriptor


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process that starts in here never sees Ctrl-C or SIGTERM.

    Both reach every process of a terminal or a job; the parent, which saves and leaves, needs its
    workers until then.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
