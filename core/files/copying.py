"""Copies tensors out of their files, several at once: NumPy and zlib let other threads run."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from triptych.core.contracts import Array
from triptych.core.files.tree import Stored
from triptych.core.machine.environment import cores

THREADS = 4
"""Most threads that copy: more of them wait for the memory."""


def copied(stored: Stored) -> Array:
    """A copy of the bits, see ``Stored.bits``. They are not compared with a checksum."""
    return np.array(stored.bits())


def verified(stored: Stored) -> Array:
    """As ``copied``; raises Malformed if the bits are not those that were saved."""
    stored.verify()
    return copied(stored)


def copies(
    tensors: Iterable[tuple[str, Stored]], copy: Callable[[Stored], Array] = verified
) -> Iterator[tuple[str, Array]]:
    """Name and copy of each tensor, in their order.

    Args:
        tensors: names and tensors.
        copy: makes one copy. It is called in several threads.

    Raises:
        Exception: what ``copy`` raised for the first tensor that could not be copied.
    """
    threads = min(cores(), THREADS)
    waiting: deque[tuple[str, Future[Array]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for name, stored in tensors:
            waiting.append((name, pool.submit(copy, stored)))
            # At most one copy for each thread is in memory before the caller takes it.
            if len(waiting) > threads:
                yield _taken(waiting)
        while waiting:
            yield _taken(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _taken(waiting: deque[tuple[str, "Future[Array]"]]) -> tuple[str, Array]:
    name, future = waiting.popleft()
    return name, future.result()
