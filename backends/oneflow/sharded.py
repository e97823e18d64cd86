"""Tensor parallelism as ``core.parallel.sharding`` describes it, in a model that is built.

Shape letters: N images, T tokens, D features, H heads.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow import state
from triptych.backends.oneflow.owned import Owned, Piece
from triptych.backends.oneflow.products import Linear, linear
from triptych.backends.oneflow.vit import Block
from triptych.core.contracts import ALONE, Array, Group, Ranks, Slot
from triptych.core.parallel.sharding import Table, split_of


def divide(model: nn.Module, table: Table, group: Group) -> None:
    """Leaves this process its part of a model whose tensors are whole, in place.

    Args:
        model: the paths of its tensors are canonical names.
        group: the processes that share the divided tensors.
    """
    if group.count == 1:
        return
    modules = dict(model.named_modules())
    for path, module in modules.items():
        _divide_tensors(module, path, table, group)
        if isinstance(module, Block):
            module.attn.heads //= group.count
            module.attn.group = group
            for norm in (module.norm1, module.norm2):
                norm.register_forward_hook(lambda _, inputs, output: _copied(output, group))
    for path, module in modules.items():
        axis = split_of(f"{path}.weight", table).axis
        if axis == 1 and isinstance(module, Linear):
            parent, _, name = path.rpartition(".")
            setattr(modules[parent], name, _RowLinear(module, group))
        elif axis == 0 and isinstance(module, Linear) and ".blocks." not in path:
            module.register_forward_pre_hook(lambda _, inputs: _copied(inputs[0], group))


def _divide_tensors(module: nn.Module, path: str, table: Table, group: Group) -> None:
    """Replaces the tensors that a module itself has by the parts of this process."""
    parameters = dict(module.named_parameters(recurse=False))
    for name, tensor in {**parameters, **dict(module.named_buffers(recurse=False))}.items():
        split = split_of(f"{path}.{name}", table)
        if split.axis is not None:
            with flow.no_grad():
                groups = tensor.chunk(split.groups, split.axis)
                own = [each.chunk(group.count, split.axis)[group.rank] for each in groups]
                part = flow.cat(own, split.axis)
            whole = name in parameters
            setattr(module, name, nn.Parameter(part, tensor.requires_grad) if whole else part)


class Missing(NamedTuple):
    """Stands for a tensor of another stage: the shape of this process's part, and its type."""

    shape: tuple[int, ...]
    dtype: flow.dtype


class Layout(NamedTuple):
    """Which part of the tensors this process has.

    Attributes:
        table: the split of each tensor. Processes of one tensor group share each divided tensor.
        ranks: the processes of the run.
        device: of this process.
    """

    table: Table
    ranks: Ranks
    device: str

    def slots(self, named: Mapping[str, Tensor | Missing]) -> dict[str, Slot]:
        """The slots of tensors of which this process may have a part, by canonical name.

        The arrays are whole. All processes that share tensors read the slots in the same order.
        """
        return {
            name: self._slot(name, x.shape, partial(self._nothing, x), _ignore)
            if isinstance(x, Missing)
            else self._slot(name, tuple(x.shape), partial(_same, x), partial(state.from_array, x))
            for name, x in named.items()
        }

    def _nothing(self, missing: Missing) -> Tensor:
        return flow.zeros(missing.shape, dtype=missing.dtype, device=self.device)

    def owned_slots(self, pieces: Mapping[str, Piece], owned: Owned) -> dict[str, Slot]:
        """Likewise, for tensors of which each copy of the model has a piece."""
        return {
            name: self._slot(
                name, piece.shape, partial(owned.whole, piece), partial(_write_piece, piece)
            )
            for name, piece in pieces.items()
        }

    def _slot(
        self,
        name: str,
        shape: tuple[int, ...],
        get: Callable[[], Tensor],
        put: Callable[[Array], None],
    ) -> Slot:
        """The slot of a tensor.

        Args:
            shape: of this process's part of the tensor.
            get: gives this part.
            put: sets it.
        """
        split, group = split_of(name, self.table), self.ranks.tensor

        def part() -> Tensor:
            return self.ranks.pipeline.sum(get())

        if split.axis is None or group.count == 1:
            return Slot(shape, lambda: state.to_array(part()), put)

        def read() -> Array:
            return split.joined(np.split(state.to_array(group.gather(part())), group.count))

        def write(array: Array) -> None:
            put(split.part(array, group.rank, group.count))

        whole = [*shape]
        whole[split.axis] *= group.count
        return Slot(tuple(whole), read, write)


def _same(x: Tensor) -> Tensor:
    return x


def _ignore(array: Array) -> None:
    """Another stage takes the array."""


def _write_piece(piece: Piece, array: Array) -> None:
    if piece.values is not None:
        stop = piece.start + piece.values.numel()
        state.from_array(piece.values, array.reshape(-1)[piece.start : stop])


class Norms:
    """The L2 norms of whole tensors of which this process may have a part.

    Args:
        ranks: processes of one tensor group share each divided tensor, and those of one pipeline
            have different tensors.
        others: groups whose processes have different parts of every tensor.
        nothing: zero in the precision and on the device of the run: this process may have none.
    """

    def __init__(
        self, table: Table, ranks: Ranks, *others: Group, nothing: Tensor | None = None
    ) -> None:
        self._table, self._ranks, self._others = table, ranks, others
        self._nothing = nothing

    @property
    def whole(self) -> bool:
        """Whether this process has all tensors, and whole."""
        return self._ranks.tensor.count == self._ranks.pipeline.count == 1 and not self._others

    def of(self, named: Mapping[str, Tensor]) -> Tensor:
        """The norm of each tensor. Canonical name -> tensor, not empty; the result is (number,)."""
        return self._squares(named).sqrt()

    def total(self, named: Mapping[str, Tensor]) -> Tensor:
        """The norm of all tensors together, those of the other stages included."""
        square = self._squares(named).sum() if named else self._nothing
        return self._ranks.pipeline.sum(square).sqrt()

    def _squares(self, named: Mapping[str, Tensor]) -> Tensor:
        products = [flow.matmul(t.reshape(1, -1), t.reshape(-1, 1)) for t in named.values()]
        squares = flow.cat(products).reshape(-1)
        for other in self._others:
            squares = other.sum(squares)
        divided = [float(split_of(name, self._table).axis is not None) for name in named]
        if self._ranks.tensor.count == 1 or not any(divided):
            return squares
        parts = squares * flow.tensor(divided, dtype=squares.dtype, device=squares.device)
        return squares - parts + self._ranks.tensor.sum(parts)


WHOLE_NORMS = Norms({}, ALONE)
"""The norms of a single process, which has whole tensors."""


def _copied(x: Tensor, group: Group) -> Tensor:
    """The same values. The gradient is the sum over the group."""
    return _copy(group).apply(x) if flow.is_grad_enabled() and x.requires_grad else x


@cache
def _copy(group: Group) -> type[flow.autograd.Function]:
    """The identity. Its gradient is the sum over a group."""

    class Copy(flow.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return group.sum(grad)

    return Copy


@cache
def _reduce(group: Group) -> type[flow.autograd.Function]:
    """The sum over a group. Its gradient is the identity."""

    class Reduce(flow.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return group.sum(x)

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad

    return Reduce


@cache
def _scatter(group: Group) -> type[flow.autograd.Function]:
    """The own columns of a whole tensor (N, D). Its gradient has the columns of all processes."""

    class Scatter(flow.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.chunk(group.count, 1)[group.rank].clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return flow.cat(group.gather(grad).chunk(group.count, 0), 1)

    return Scatter


class _RowLinear(nn.Module):
    """A linear layer of which this process has the weights of some inputs.

    The inputs are those of this process, or all. The bias is added after the sum.
    """

    def __init__(self, linear: Any, group: Group) -> None:
        super().__init__()
        self.weight, self.bias, self.group = linear.weight, linear.bias, group

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        if x.shape[-1] != self.weight.shape[1]:
            x = _scatter(self.group).apply(x)
        y = _reduce(self.group).apply(linear(x, self.weight))
        return y if self.bias is None else y + self.bias
