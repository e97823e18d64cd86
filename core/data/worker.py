"""A worker process: loads its batches into shared memory, one after the other, as slots are free.

It is started by ``workers`` and imports what loading needs, never a framework.
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
"""The job, the numbers of this worker's batches in order, and how many slots the memory has."""
Reply = Filled | UserError
"""The batch has been loaded, or why it cannot be."""

PATROL = 0.5
"""Seconds between two looks at whether the parent lives."""


def main(connection: int, memory: int, parent: int) -> None:
    """Serves the process ``parent``.

    Batch i goes to slot i modulo the number of slots. The first batches find their slots free; each
    later one waits until the parent has given one more slot back.

    Args:
        connection: file descriptor of a pipe. It brings one ``Task``, then an empty message for
            each slot given back; a ``Reply`` for each batch goes back in order.
        memory: file descriptor of the shared slots.
    """
    pipe = Connection(connection)
    try:
        job, numbers, slots = pipe.recv()
        free = threading.Semaphore(slots)
        # A thread of its own reads, whatever this one waits for: the parent never waits to write.
        threading.Thread(target=_listen, args=(pipe, free, parent), daemon=True).start()
        planes = shared_planes(memory, slots, job.shape)
        for place, number in enumerate(numbers):
            free.acquire()
            pipe.send(_load(job, number, planes[place % slots]))
    except (EOFError, ConnectionError):
        return  # the parent has closed the pipe or is gone


def shared_planes(memory: int, slots: int, shape: tuple[int, ...]) -> Planes:
    """The slots, (slots, *shape), of the memory behind a file descriptor."""
    return np.frombuffer(mmap.mmap(memory, 0), np.uint8).reshape(slots, *shape)


def _load(job: Job, number: int, out: Planes) -> Reply:
    try:
        return job.fill(number, out)
    except UserError as error:
        return error


def _listen(pipe: Connection, free: threading.Semaphore, parent: int) -> None:
    """Counts the slots given back; ends this process with its parent, also within a batch."""
    try:
        while os.getppid() == parent:
            if pipe.poll(PATROL):
                pipe.recv_bytes()
                free.release()
    except (EOFError, ConnectionError):
        pass  # as when the parent is gone
    os._exit(1)
