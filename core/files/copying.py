"""Copies tensors out of their files, several at once: NumPy and zlib let other threads run."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread

import numpy as np
from numpy.typing import DTypeLike

from triptych.core.contracts import Array
from triptych.core.files.tree import Stored
from triptych.core.machine.environment import cores

THREADS = 4
"""Most threads that copy: more of them wait for the memory."""
LARGE = 1 << 20
"""Bytes from which two threads copy an array, each of them half: one is slower than the memory."""


def copied(values: Array, dtype: DTypeLike = None) -> Array:
    """A copy of an array, contiguous in C order. dtype: of the copy; None: that of the array."""
    copy = np.empty(values.shape, dtype or values.dtype)
    half = len(values) // 2 if copy.nbytes >= LARGE else 0
    if not half:
        np.copyto(copy, values)
        return copy
    # A thread of its own and no pool: a worker process that is forked later would lack its threads.
    other = Thread(target=np.copyto, args=(copy[:half], values[:half]))
    other.start()
    np.copyto(copy[half:], values[half:])
    other.join()
    return copy


def verified(stored: Stored) -> Array:
    """A copy of the bits; raises Malformed if they are not those that were saved."""
    stored.verify()
    return copied(stored.bits())


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
