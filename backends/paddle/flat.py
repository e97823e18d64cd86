"""Packs tensors into one buffer, so that one operation updates all of them; or takes them apart.

On a GPU each operation is a launch, which takes longer than the arithmetic of a small tensor. On
the CPU nothing is gained, and the temporary tensors of an update would be as large as the model.
There the operations on a large tensor wait for the memory, unless they take it part by part.
"""

from collections.abc import Iterator, Sequence

import paddle
from paddle import Tensor

ALIGNMENT = 64
"""Each tensor starts at a multiple of so many values: kernels read several numbers at once."""
PART = 1 << 17
"""About how many values a part has. The parts of an update's tensors fit in a core's cache."""


@paddle.no_grad()
def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Moves tensors into one new buffer. They stay the same objects and become views of it.

    Call this on the final device and in the final precision.

    Args:
        tensors: at least one, of one type.

    Returns:
        The buffer, 1-d, with zeros between the tensors. An operation on it in place changes them.
    """
    buffer = join(tensors)
    start = 0
    for tensor in tensors:
        # The slice shares the memory of the buffer. So does the tensor, which keeps its shape.
        buffer._slice(start, start + tensor.size)._share_buffer_to(tensor)
        start += tensor.size + _gap(tensor)
    return buffer


@paddle.no_grad()
def join(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of tensors in the layout of ``pack``, by one operation."""
    parts = []
    for tensor in tensors:
        parts.append(tensor.detach().flatten())
        if gap := _gap(tensor):
            parts.append(paddle.zeros([gap], tensor.dtype))
    return paddle.concat(parts)


def parts(*tensors: Tensor) -> Iterator[Sequence[Tensor]]:
    """Views of the same rows of tensors of one shape. An operation on them in place changes these.

    Args:
        tensors: contiguous, with at least one dimension.
    """
    count = len(tensors[0])
    rows = max(1, PART * count // max(1, tensors[0].size))
    if rows >= count:
        yield tensors
        return
    for start in range(0, count, rows):
        yield [tensor._slice(start, min(start + rows, count)) for tensor in tensors]


def _gap(tensor: Tensor) -> int:
    return int(-tensor.size % ALIGNMENT)
