"""A worker process: loads the batches it is asked for into shared memory, until it is left alone.

It is started by ``workers`` and imports what loading needs, never a framework.
"""

import mmap
import os
import threading
import time
from multiprocessing.connection import Connection

import numpy as np

from triptych.core.data.jobs import Filled, Job, Planes
from triptych.core.errors import UserError

Request = tuple[int, int]
"""Number of a batch, and the slot of the shared memory it goes to."""
Reply = Filled | str
"""The batch has been loaded, or the message of a ``UserError``."""


def main(connection: int, memory: int, parent: int) -> None:
    """Serves the process ``parent``.

    Args:
        connection: file descriptor of a pipe. It brings the job and the number of slots, then
            requests; replies go back in the same order.
        memory: file descriptor of the shared slots.
    """
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    pipe = Connection(connection)
    try:
        job, slots = pipe.recv()
        planes = shared_planes(memory, slots, job.shape)
        while True:
            number, slot = pipe.recv()
            pipe.send(_load(job, number, planes[slot]))
    except (EOFError, ConnectionError):
        return  # the parent has closed the pipe or is gone


def shared_planes(memory: int, slots: int, shape: tuple[int, ...]) -> Planes:
    """The slots, (slots, *shape), of the memory behind a file descriptor."""
    return np.frombuffer(mmap.mmap(memory, 0), np.uint8).reshape(slots, *shape)


def _load(job: Job, number: int, out: Planes) -> Reply:
    try:
        return job.fill(number, out)
    except UserError as error:
        return str(error)


def _leave_with(parent: int) -> None:
    """Ends this process when its parent is gone, also in the middle of a batch."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
