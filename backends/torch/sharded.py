"""Tensor parallelism as ``core.parallel.sharding`` describes it, in a model that is built.

Shape letters: N images, T tokens, D features, H heads.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from triptych.backends.torch import state
from triptych.core.contracts import ALONE, Array, Group, Ranks, Slot
from triptych.core.parallel.sharding import Split, Table, split_of


def divide(model: nn.Module, table: Table, group: Group) -> None:
    """Leaves this process its part of a model whose tensors are whole, in place.

    Args:
        model: the paths of its tensors are canonical names. Its parameters stay the same objects.
        group: the processes that share the divided tensors.
    """
    if group.count == 1:
        return
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = _part(tensor.data, split_of(name, table), group)
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        block.attn = _Attention(block.attn, group)
        for norm in (block.norm1, block.norm2):
            norm.register_forward_hook(lambda module, inputs, output: _Copy.apply(output, group))
    for name, linear in [*model.named_modules()]:
        axis = split_of(f"{name}.weight", table).axis
        if axis == 1 and isinstance(linear, nn.Linear):
            model.set_submodule(name, _RowLinear(linear, group))
        elif axis == 0 and isinstance(linear, nn.Linear) and ".blocks." not in name:
            linear.register_forward_pre_hook(lambda module, inputs: _Copy.apply(*inputs, group))


def _part(tensor: Tensor, split: Split, group: Group) -> Tensor:
    """The part of a whole tensor that this process has."""
    if split.axis is None:
        return tensor
    parts = tensor.chunk(split.groups, split.axis)
    return torch.cat([x.chunk(group.count, split.axis)[group.rank] for x in parts], split.axis)


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

    def slots(self, named: Mapping[str, Tensor], *others: Group) -> dict[str, Slot]:
        """The slots of tensors of which this process may have a part, by canonical name.

        The arrays are whole. All processes read the slots in the same order.

        Args:
            others: groups of which one process has each tensor. On the others the tensor is on
                PyTorch's device "meta": it has a shape and no values.
        """
        if self.ranks.tensor.count == 1 and not others:
            return state.slots(named)
        return {name: self._slot(name, tensor, others) for name, tensor in named.items()}

    def _slot(self, name: str, tensor: Tensor, others: Sequence[Group]) -> Slot:
        split, group = split_of(name, self.table), self.ranks.tensor
        divided = split.axis is not None and group.count > 1

        def read() -> Array:
            part = tensor
            for other in others:
                part = torch.zeros_like(part, device=self.device) if part.is_meta else part
                part = other.sum(part)
            if not divided:
                return state.to_array(part)
            return split.joined(np.split(state.to_array(group.gather(part)), group.count))

        def write(array: Array) -> None:
            if not tensor.is_meta:
                part = split.part(array, group.rank, group.count) if divided else array
                state.from_array(tensor, part)

        shape = list(tensor.shape)
        if divided:
            shape[split.axis or 0] *= group.count
        return Slot(tuple(shape), read, write)


class Norms:
    """The L2 norms of whole tensors of which this process may have a part.

    Args:
        others: groups whose processes have different tensors.
        nothing: zero in the precision and on the device of the run: this process may have none.
    """

    def __init__(
        self, table: Table, group: Group, *others: Group, nothing: Tensor | None = None
    ) -> None:
        self._table, self._group, self._others = table, group, others
        self._nothing = torch.zeros(()) if nothing is None else nothing

    def of(self, named: Mapping[str, Tensor]) -> Tensor:
        """The norm of each tensor. Canonical name -> tensor, not empty; the result is (number,)."""
        # PyTorch's optimizers use the operations on lists, too. They have no public names.
        norms = torch.stack(torch._foreach_norm(list(named.values())))
        divided = [split_of(name, self._table).axis is not None for name in named]
        if self._group.count == 1 or not any(divided):
            return norms
        rows = torch.tensor(divided).nonzero()[:, 0].to(norms.device)
        total = self._group.sum(norms[rows].square())
        return norms.index_copy(0, rows, total.sqrt())

    def total(self, named: Mapping[str, Tensor]) -> Tensor:
        """The norm of all tensors together, those that other processes have included."""
        norm = torch.linalg.vector_norm(self.of(named)) if named else self._nothing
        for group in self._others:
            norm = group.sum(norm.square()).sqrt()
        return norm


WHOLE_NORMS = Norms({}, ALONE.tensor)
"""The norms of a single process, which has whole tensors."""


class _Copy(torch.autograd.Function):
    """The identity. Its gradient is the sum over a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(gradients[0]), None


class _Reduce(torch.autograd.Function):
    """The sum over a group. Its gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        total: Tensor = group.sum(x)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Scatter(torch.autograd.Function):
    """The own columns of a whole tensor (N, D). Its gradient has the columns of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.chunk(group.count, 1)[group.rank]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.cat(ctx.group.gather(gradients[0]).chunk(ctx.group.count), 1), None


class _RowLinear(nn.Module):
    """A linear layer of which this process has the weights of some inputs.

    The inputs are those of this process, or all. The bias is added after the sum.
    """

    def __init__(self, linear: nn.Linear, group: Group) -> None:
        super().__init__()
        self.weight, self.bias, self.group = linear.weight, linear.bias, group

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        if x.shape[-1] != self.weight.shape[1]:
            x = _Scatter.apply(x, self.group)
        y: Tensor = _Reduce.apply(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


class _Attention(nn.Module):
    """The heads of timm's attention that this process has. (N, T, D) -> (N, T, D / count)."""

    qkv: nn.Linear
    proj: nn.Module

    def __init__(self, whole: Any, group: Group) -> None:
        super().__init__()
        self.qkv, self.proj, self.scale = whole.qkv, whole.proj, whole.scale
        self.num_heads = whole.num_heads // group.count

    def forward(self, x: Tensor, **masks: None) -> Tensor:
        """(N, T, D) -> (N, T, D). Newer versions of timm's block name masks, which are none."""
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        y: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, length, -1))
        return y
