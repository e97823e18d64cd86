"""Where the keys of a step go in the queue of MoCo (arXiv 1911.05722, section 3.2).

The words of MOCA's codebook likewise, (K, D) with a word in each row.

Plain integers, kept on the host: nothing has to wait for a device to know them. The queue itself
is a tensor of the backend, (C, K), a key in each of its K columns.
"""

from collections.abc import Iterator, Sequence

from triptych.core import contracts
from triptych.core.contracts import Tensor


def segments(pointer: int, count: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Columns that keys overwrite, and which keys, in one piece or in two.

    Key i goes to column (pointer + i) mod size: always over the oldest ones.

    Args:
        pointer: first column, 0 <= pointer < size.
        count: keys of the step over all ranks, at most ``size``.
        size: columns of the queue.

    Raises:
        ValueError: more keys than columns; or a pointer outside the queue.
    """
    if not 0 <= pointer < size or count > size:
        raise ValueError(f"queue of {size}: cannot take {count} keys at column {pointer}")
    first = min(count, size - pointer)
    yield slice(pointer, pointer + first), slice(0, first)
    if first < count:
        yield slice(0, count - first), slice(first, count)


def advance(pointer: int, count: int, size: int) -> int:
    """The column where the next step's keys begin."""
    return (pointer + count) % size


DISTANCE_MOMENTUM = 0.99
"""Of the running mean that sets the temperature of MOCA's codes."""


def moved(distance: Tensor, difference: Tensor) -> Tensor:
    """The running mean after one view. Scalars, or tensors of one number."""
    return DISTANCE_MOMENTUM * distance + (1.0 - DISTANCE_MOMENTUM) * difference


def enqueue(memory: contracts.Memory, keys: Tensor, /) -> None:
    """``core.contracts.Memory.enqueue`` on tensors of any framework."""
    size = memory.queue.shape[1]
    for columns, rows in segments(memory.pointer, len(keys), size):
        memory.queue[:, columns] = keys[rows].T
    memory.pointer = advance(memory.pointer, len(keys), size)


def update(memory: contracts.Codebook, words: Tensor, differences: Sequence[Tensor], /) -> None:
    """``core.contracts.Codebook.update`` on tensors of any framework."""
    size = len(memory.words)
    for rows, new in segments(memory.pointer, len(words), size):
        memory.words[rows] = words[new]
    distance = memory.distance
    for difference in differences:
        distance = moved(distance, difference)
    memory.distance[:] = distance
    memory.distance_used[:] = distance
    memory.pointer = advance(memory.pointer, len(words), size)
    memory.updates += 1


class Queue:
    """``core.contracts.Memory`` but for its tensor; the pointer is on the host."""

    counters = ("pointer",)
    queue: Tensor
    pointer = 0
    enqueue = enqueue


class Codebook:
    """``core.contracts.Codebook`` but for its tensors; pointer and count are on the host."""

    counters = ("pointer", "updates")
    words: Tensor
    distance: Tensor
    distance_used: Tensor
    pointer = 0
    updates = 0
    update = update
