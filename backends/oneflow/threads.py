"""Threads that share the loops of ``kernels`` over blocks. The numbers are the same for any number.

NumPy's matrix products have threads of their own. NumPy computes all else in the thread of the
call, but lets others compute meanwhile.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_pool: ThreadPoolExecutor | None = None
_count = 1


def set_count(count: int) -> None:
    """Sets the number of threads, that of the caller included."""
    global _pool, _count
    if count != _count:
        _pool, _count = ThreadPoolExecutor(count - 1, "kernels") if count > 1 else None, count


def each(work: Callable[[slice], None], total: int, step: int) -> None:
    """Does a work for all slices of ``step`` values, in any order, and waits for the end.

    Args:
        work: changes nothing that it reads for another slice.
        total: number of values.
    """
    slices = [slice(start, start + step) for start in range(0, total, step)]
    count = min(_count, len(slices))

    def run(first: int) -> None:
        with np.errstate(all="ignore"):  # each thread has its own setting
            for part in slices[first::count]:
                work(part)

    others = [_pool.submit(run, first) for first in range(1, count)] if _pool else []
    run(0)
    for other in others:
        other.result()
