"""Tensor parallelism as ``core.parallel.sharding`` describes it, in a model that is built.

Shape letters: N images, T tokens, D features, H heads.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple, cast

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from triptych.backends.paddle import parallel, state
from triptych.backends.paddle.kernels import sum_rows
from triptych.backends.paddle.layers import linear_weights, plain_forms_serve
from triptych.backends.paddle.vit import Block, VisionTransformer
from triptych.core.contracts import ALONE, Array, Group, Ranks, Slot
from triptych.core.parallel.owners import owners
from triptych.core.parallel.sharding import Split, Table, split_of


def divide(model: nn.Layer, table: Table, group: Group) -> None:
    """Leaves this process its part of a model whose tensors are whole, in place.

    Args:
        model: the paths of its tensors are canonical names. Its parameters stay the same objects.
        group: the processes that share the divided tensors.
    """
    if group.count == 1:
        return
    transposed = linear_weights(model)
    for name, tensor in model.state_dict().items():
        split = split_of(name, table)
        if split.axis is not None:
            frozen = tensor.stop_gradient
            tensor.data = _part(tensor, split, 1 - split.axis if name in transposed else 0, group)
            tensor.stop_gradient = frozen  # Paddle 2.6 takes that of the part, too
    for name, layer in [*model.named_sublayers()]:
        if isinstance(layer, Block):
            _divide_block(layer, group)
        elif isinstance(layer, VisionTransformer):
            cast(Any, layer).class_attention = partial(_all_heads, layer.class_attention, group)
        elif isinstance(layer, nn.Linear):
            _divide_linear(model, name, split_of(f"{name}.weight", table), group)


def _part(tensor: Tensor, split: Split, axis: int, group: Group) -> Tensor:
    """The part of a whole tensor that this process has. axis: of the native tensor."""
    parts = paddle.chunk(tensor.detach(), split.groups, axis)
    return paddle.concat([paddle.chunk(x, group.count, axis)[group.rank] for x in parts], axis)


def _divide_block(block: Block, group: Group) -> None:
    """The attention has the heads of this process. Each norm is before a divided layer."""
    block.attn.heads //= group.count
    for norm in (block.norm1, block.norm2):
        norm.register_forward_post_hook(lambda layer, inputs, output: _Copy.apply(output, group))


def _divide_linear(model: nn.Layer, name: str, split: Split, group: Group) -> None:
    path, _, key = name.rpartition(".")
    parent = dict(model.named_sublayers(include_self=True))[path]
    layer = getattr(parent, key)
    if split.axis == 1:
        setattr(parent, key, _RowLinear(layer, group))
    elif split.axis == 0 and ".blocks." not in name:
        layer.register_forward_pre_hook(lambda layer, inputs: _Copy.apply(inputs[0], group))


def _all_heads(attention: Callable[[Tensor], Tensor], group: Group, images: Tensor) -> Tensor:
    """The attention of all heads, from a function that gives those of this process. (N, H, T)."""
    return paddle.concat(paddle.chunk(group.gather(attention(images)), group.count), 1)


class _Copy(PyLayer):
    """The identity. Its gradient is the sum over a group.

    A hook on the tensor would need no copy, but Paddle ignores what it returns where the tensor is
    a result of ``reshape`` that had this shape before.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = ctx.group.sum(grad)
        return total


class _Reduce(PyLayer):
    """The sum over a group. Its gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        total: Tensor = group.sum(x)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _RowLinear(nn.Linear):
    """A linear layer of which this process has the weights of some inputs.

    The inputs are those of this process, or all. The bias is added after the sum.
    """

    def __init__(self, linear: nn.Linear, group: Group) -> None:
        nn.Layer.__init__(self)
        self.weight, self.bias, self.group = linear.weight, linear.bias, group

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        if x.shape[-1] != self.weight.shape[0]:
            parts = paddle.chunk(_Copy.apply(x, self.group), self.group.count, axis=-1)
            x = parts[self.group.rank]
        y = _Reduce.apply(paddle.matmul(x, self.weight), self.group)
        if self.bias is None:
            return y
        # In mixed precision the sum needs casts of its operands, which a PyLayer would not undo.
        return y + self.bias if plain_forms_serve(y) else _AddBias.apply(y, self.bias)


class _AddBias(PyLayer):
    """x + bias with fast ways to repeat the bias and to sum its gradient. x: (..., D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.of_x = not x.stop_gradient
        return x + paddle.expand(bias, x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, Tensor]:
        # Paddle 2.6 refuses a gradient that nobody wants.
        return grad if ctx.of_x else None, sum_rows(grad.reshape([-1, grad.shape[-1]]))


def whole_slot(tensor: Tensor, transposed: bool, split: Split, group: Group) -> Slot:
    """The slot of a tensor of which this process may have a part. Its array is whole.

    All processes of the group read it together.

    Args:
        transposed: whether it is the weight of a linear layer.
        split: how it is divided.
    """
    own = state.tensor_slot(tensor, transposed)
    if split.axis is None or group.count == 1:
        return own

    def read() -> Array:
        parts = np.split(state.to_array(group.gather(tensor)), group.count)
        parts = [part.T if transposed else part for part in parts]
        return np.ascontiguousarray(split.joined(parts))

    def write(array: Array) -> None:
        own.write(split.part(array, group.rank, group.count))

    shape = list(own.shape)
    shape[split.axis] *= group.count
    return Slot(tuple(shape), read, write)


class Norms:
    """The L2 norms of whole tensors of which this process may have a part.

    Args:
        table: the split of each tensor, by canonical name.
        ranks: processes of one tensor group share each divided tensor, and those of one pipeline
            have different tensors.
        nothing: 0 as a scalar in the precision of the run, for a stage of a pipeline.
    """

    def __init__(self, table: Table, ranks: Ranks, nothing: Tensor | None = None) -> None:
        self._table, self._ranks, self._nothing = table, ranks, nothing

    def divides(self, name: str) -> bool:
        """Whether this process has only a part of a tensor."""
        return self._ranks.tensor.count > 1 and split_of(name, self._table).axis is not None

    def of_divided(self, squares: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
        """Norms of divided tensors. All are exchanged at once.

        Args:
            squares: name -> sums of squares of the parts of some tensors, scalars.

        Returns:
            Name -> the norms of the whole tensors, scalars.
        """
        values = [value for group in squares.values() for value in group]
        if not values:
            return {}
        norms = iter(paddle.sqrt(self._ranks.tensor.sum(paddle.stack(values))).unbind())
        return {name: [next(norms) for _ in group] for name, group in squares.items()}

    def total(self, squares: Mapping[str, Tensor]) -> Tensor:
        """The norm of all tensors together, those of the other stages included.

        Args:
            squares: name -> sum of squares of this process's part, a scalar.
        """
        own = [value for name, value in squares.items() if not self.divides(name)]
        whole = reduce(add, own) if own else cast(Tensor, self._nothing)  # a stage may train none
        parts = [value for name, value in squares.items() if self.divides(name)]
        if parts:
            whole = whole + self._ranks.tensor.sum(reduce(add, parts))
        if self._ranks.pipeline.count > 1:
            whole = self._ranks.pipeline.sum(whole)
        return paddle.sqrt(whole)


WHOLE = Norms({}, ALONE)
"""The norms of a single process, which has whole tensors."""


class Whole(NamedTuple):
    """The shape and type of a whole tensor, which this process may lack."""

    shape: tuple[int, ...]
    """Canonical."""
    dtype: Any


def sent_slot(own: Slot | None, like: Whole, group: Group, source: int) -> Slot:
    """The slot of a tensor that one process of a group has. All of them read it together.

    Args:
        own: of that process; None on the others.
        source: rank of that process.
    """
    if own is not None and group.count == 1:
        return own

    def read() -> Array:
        values = paddle.zeros(like.shape, like.dtype)
        if own is not None:
            values = paddle.to_tensor(own.read(), like.dtype)
        cast(parallel.Group, group).broadcast(values, source)
        return state.to_array(values)

    def write(array: Array) -> None:
        if own is not None:
            own.write(array)

    return Slot(like.shape, read, write)


class Owners:
    """Which copy of the model updates which parameter (see ``core.parallel.owners``).

    The owner alone has the optimizer's state of a parameter.

    Args:
        named: canonical name -> parameter.
        group: the copies; of one copy, it owns all.
    """

    def __init__(self, named: Mapping[str, Tensor], group: Group) -> None:
        self._named, self._group = dict(named), group
        self._owner = owners({name: p.size for name, p in named.items()}, group.count)

    def own(self, name: str) -> bool:
        """Whether this copy updates a parameter."""
        return self._owner[name] == self._group.rank

    def spread(self) -> None:
        """Gives all copies the parameters that their owners have updated."""
        for owner in range(self._group.count if self._group.count > 1 else 0):
            owned = [p for name, p in self._named.items() if self._owner[name] == owner]
            flat = paddle.concat([parameter.flatten() for parameter in owned])
            self._send(flat, owner)
            parts = paddle.split(flat, [parameter.size for parameter in owned])
            for parameter, part in zip(owned, parts, strict=True):
                paddle.assign(part.reshape(parameter.shape), parameter)

    def slot(self, name: str, own: Slot | None, like: Whole) -> Slot:
        """The slot of a moment of a parameter. All copies read it together.

        Args:
            own: of this copy; None: another copy owns the parameter.
        """
        return sent_slot(own, like, self._group, self._owner[name])

    def _send(self, x: Tensor, owner: int) -> None:
        cast(parallel.Group, self._group).broadcast(x, owner)
