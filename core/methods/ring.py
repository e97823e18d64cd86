"""The ring buffers: MoCo's queue of keys (arXiv 1911.05722, section 3.2), MOCA's codebook of words.

The queue is a native tensor (C, K) with a key in each column. The codebook is a native tensor
(K, D) with a word in each row. The pointers are plain integers on the host, so nothing waits for a
device to read them.
"""

from collections.abc import Iterator, Sequence

from triptych.core import contracts
from triptych.core.contracts import Tensor


def segments(pointer: int, count: int, size: int) -> Iterator[tuple[slice, slice]]:
    """The columns that a step's keys overwrite, in one piece or two.

    Key i goes to column (pointer + i) mod size, which holds the oldest key.

    Args:
        pointer: first column, 0 <= pointer < size.
        count: number of keys of the step over all ranks, at most ``size``.
        size: number of columns of the queue.

    Yields:
        A slice of columns, and the slice of keys that go there.

    Raises:
        ValueError: there are more keys than columns, or the pointer is outside the queue.
    """
    if not 0 <= pointer < size or count > size:
        raise ValueError(f"queue of {size}: cannot take {count} keys at column {pointer}")
    first = min(count, size - pointer)
    yield slice(pointer, pointer + first), slice(0, first)
    if first < count:
        yield slice(0, count - first), slice(first, count)


def advance(pointer: int, count: int, size: int) -> int:
    """The first column for the next step's keys."""
    return (pointer + count) % size


DISTANCE_MOMENTUM = 0.99
"""Momentum of the running mean that sets the temperature of MOCA's codes."""


def running_mean(distance: Tensor, difference: Tensor) -> Tensor:
    """The running mean ``distance`` after one view's ``difference``.

    Both are scalars or tensors of one number.
    """
    return DISTANCE_MOMENTUM * distance + (1.0 - DISTANCE_MOMENTUM) * difference


def enqueue(memory: contracts.Memory, keys: Tensor, /) -> None:
    """Implements ``core.contracts.Memory.enqueue`` for tensors of any framework."""
    size = memory.queue.shape[1]
    for columns, rows in segments(memory.pointer, len(keys), size):
        memory.queue[:, columns] = keys[rows].T
    memory.pointer = advance(memory.pointer, len(keys), size)


def update(memory: contracts.Codebook, words: Tensor, differences: Sequence[Tensor], /) -> None:
    """Implements ``core.contracts.Codebook.update`` for tensors of any framework."""
    size = len(memory.words)
    for rows, new in segments(memory.pointer, len(words), size):
        memory.words[rows] = words[new]
    distance = memory.distance
    for difference in differences:
        distance = running_mean(distance, difference)
    memory.distance[:] = distance
    memory.distance_used[:] = distance
    memory.pointer = advance(memory.pointer, len(words), size)
    memory.updates += 1


class Queue:
    """Implements ``core.contracts.Memory`` except for its tensor. The pointer is on the host."""

    counters = ("pointer",)
    queue: Tensor
    pointer = 0
    enqueue = enqueue


class Codebook:
    """Implements ``core.contracts.Codebook`` except for its tensors.

    The pointer and the number of updates are on the host.
    """

    counters = ("pointer", "updates")
    words: Tensor
    distance: Tensor
    distance_used: Tensor
    pointer = 0
    updates = 0
    update = update
