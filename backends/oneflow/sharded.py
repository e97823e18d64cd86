"""Tensor parallelism: a pass over a built model that leaves each process its part of the layers.

The table of ``core.parallel.sharding`` says which tensors are divided. What enters a layer that is
divided by its outputs has the gradients of all processes added up. What leaves a layer that is
divided by its inputs has the values added up (arXiv 1909.08053, section 3).

Shape letters: N images, T tokens, D features, H heads.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import oneflow as flow
import oneflow.nn.functional as F
from oneflow import Tensor, nn

from triptych.backends.oneflow import state
from triptych.backends.oneflow.layers import Linear
from triptych.backends.oneflow.vit import Block
from triptych.core.contracts import ALONE, Array, Group, Ranks, Slot
from triptych.core.parallel.sharding import Split, split_of

Table = Mapping[str, Split]
"""The split of each tensor, by canonical name."""


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


def whole_slots(named: Mapping[str, Tensor], table: Table, group: Group) -> dict[str, Slot]:
    """The slots of tensors of which this process may have a part, by canonical name.

    The arrays are whole. All processes of the group read the slots in the same order.
    """
    if group.count == 1:
        return state.slots(named)
    return {name: _slot(tensor, split_of(name, table), group) for name, tensor in named.items()}


def _slot(tensor: Tensor, split: Split, group: Group) -> Slot:
    if split.axis is None:
        return state.tensor_slot(tensor)

    def read() -> Array:
        return split.joined(np.split(state.to_array(group.gather(tensor)), group.count))

    def write(array: Array) -> None:
        state.from_array(tensor, split.part(array, group.rank, group.count))

    shape = list(tensor.shape)
    shape[split.axis] *= group.count
    return Slot(tuple(shape), read, write)


class Norms:
    """The L2 norms of whole tensors of which this process may have a part.

    Args:
        ranks: processes of one tensor group share each divided tensor, and those of one pipeline
            have different tensors.
    """

    def __init__(self, table: Table, ranks: Ranks) -> None:
        self._table, self._ranks = table, ranks

    @property
    def whole(self) -> bool:
        """Whether this process has all tensors, and whole."""
        return self._ranks.tensor.count == self._ranks.pipeline.count == 1

    def of(self, named: Mapping[str, Tensor]) -> Tensor:
        """The norm of each tensor. Canonical name -> tensor, not empty; the result is (number,)."""
        return self._squares(named).sqrt()

    def total(self, named: Mapping[str, Tensor]) -> Tensor:
        """The norm of all tensors together, those of the other stages included."""
        square = self._squares(named).sum()
        return self._ranks.pipeline.sum(square).sqrt()

    def _squares(self, named: Mapping[str, Tensor]) -> Tensor:
        products = [flow.matmul(t.reshape(1, -1), t.reshape(-1, 1)) for t in named.values()]
        squares = flow.cat(products).reshape(-1)
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
        y = _reduce(self.group).apply(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias
