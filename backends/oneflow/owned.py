"""The optimizer's state shared among the copies of the model: each updates its part of a buffer.

This is the first stage of ZeRO (arXiv 1910.02054) on packed parameters. The parts are equal and
contiguous, whatever tensors begin or end in them.
"""

from collections.abc import Mapping
from typing import NamedTuple, cast

import oneflow as flow
from oneflow import Tensor

from triptych.backends.oneflow.parallel import Group
from triptych.core import contracts


class Piece(NamedTuple):
    """What this copy has of a packed tensor.

    Attributes:
        values: 1-d view; None: nothing.
        start: index of the first of the values in the tensor.
        shape: of the tensor.
    """

    values: Tensor | None
    start: int
    shape: tuple[int, ...]


class Owned:
    """The part of packed parameters that this copy of the model updates.

    Args:
        values: the buffer of all packed parameters, 1-d.
        replicas: the copies of the model.

    Attributes:
        part: which values this copy owns.
    """

    def __init__(self, values: Tensor, replicas: contracts.Group) -> None:
        size = values.numel()
        self._values, self._group = values, cast(Group, replicas)
        self._length = -(-size // replicas.count)
        start = min(replicas.rank * self._length, size)
        self.part = slice(start, min(start + self._length, size))

    @flow.no_grad()
    def sum(self, gradients: Tensor) -> None:
        """Sets this copy's part of the gradients of all parameters to the sums over all copies."""
        rest = self._group.count * self._length - gradients.numel()
        padded = flow.cat([gradients, gradients.new_zeros((rest,))]) if rest else gradients
        own = gradients[self.part]
        own.copy_(self._group.sum_part(padded)[: own.numel()])

    @flow.no_grad()
    def share(self) -> None:
        """Sets the parameters that other copies own to theirs."""
        values = self._values
        own = values.new_zeros((self._length,))
        own[: self.part.stop - self.part.start].copy_(values[self.part])
        values.copy_(self._group.gather(own)[: values.numel()])

    @flow.no_grad()
    def pieces(self, own: Tensor, like: Mapping[str, Tensor]) -> dict[str, Piece]:
        """What this copy has of each packed tensor.

        Args:
            own: its part of the buffer.
            like: tensors with the names, shapes and order of the packed ones.
        """
        found, begin = {}, 0
        for name, tensor in like.items():
            end = begin + tensor.numel()
            first, last = max(begin, self.part.start), min(end, self.part.stop)
            view = own[first - self.part.start : last - self.part.start] if first < last else None
            found[name] = Piece(view, first - begin, tuple(tensor.shape))
            begin = end
        return found

    @flow.no_grad()
    def whole(self, piece: Piece) -> Tensor:
        """The tensor, from the pieces of all copies."""
        tensor = self._values.new_zeros(piece.shape).reshape(-1)
        if piece.values is not None:
            tensor[piece.start : piece.start + piece.values.numel()].copy_(piece.values)
        return self._group.sum(tensor).reshape(*piece.shape)
