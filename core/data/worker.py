"""A worker process, which loads its batches one after the other into free slots of shared memory.

``workers`` starts it. It imports only what loading needs, never a framework.
"""

import mmap
import os
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np

from triptych.core.data.jobs import Filled, Job, Planes
from triptych.core.errors import UserError

Task = tuple[Job, Sequence[int], int]
"""(job, numbers of this worker's batches in order, number of slots in the memory)."""
Reply = Filled | UserError
"""The loaded batch, or the error of loading it."""

PATROL = 0.5
"""Seconds between two checks that the parent process still runs."""


def main(connection: int, memory: int, parent: int) -> None:
    """Serves the process ``parent``.

    Batch i goes to slot i modulo the number of slots. All slots are free at first. A later batch
    waits until the parent has given one more slot back.

    Args:
        connection: file descriptor of a pipe. The parent sends one ``Task``, then an empty message
            for each slot given back. The worker sends a ``Reply`` for each batch, in order.
        memory: file descriptor of the shared slots.
        parent: process number of the parent.
    """
    pipe = Connection(connection)
    try:
        job, numbers, slots = pipe.recv()
        free = threading.Semaphore(slots)
        # A further thread reads while this one works, so that the parent never waits to write.
        threading.Thread(target=_listen, args=(pipe, free, parent), daemon=True).start()
        planes = shared_planes(memory, slots, job.shape)
        for place, number in enumerate(numbers):
            free.acquire()
            pipe.send(_load(job, number, planes[place % slots]))
    except (EOFError, ConnectionError):
        return  # the parent has closed the pipe or is gone


def shared_planes(memory: int, slots: int, shape: tuple[int, ...]) -> Planes:
    """The shared memory of a file descriptor as an array (slots, *shape)."""
    return np.frombuffer(mmap.mmap(memory, 0), np.uint8).reshape(slots, *shape)


def _load(job: Job, number: int, out: Planes) -> Reply:
    try:
        return job.fill(number, out)
    except UserError as error:
        return error


def _listen(pipe: Connection, free: threading.Semaphore, parent: int) -> None:
    """Counts the slots given back. Ends this process with its parent, also within a batch."""
    try:
        while os.getppid() == parent:
            if pipe.poll(PATROL):
                pipe.recv_bytes()
                free.release()
    except (EOFError, ConnectionError):
        pass  # the parent is gone
    os._exit(1)
