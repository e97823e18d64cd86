"""A transformer block as one operation in NumPy, which waits for OneFlow's queue once.

Each operation in NumPy waits for its inputs: OneFlow's threads hand over the queue twice for that.
On busy cores, the waits of a block would take as long as its elementwise arithmetic.

Shape letters: N images, T tokens, D columns.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import oneflow as flow
from oneflow import Tensor
from oneflow._oneflow_internal.autograd import AutogradFunctionBase

from triptych.backends.oneflow import flat, kernels
from triptych.core.contracts import Array

Backward = Callable[[Array], list[Any]]
"""Gradient of a result -> gradients of what it was computed from, None for one not wanted."""


class Layer(NamedTuple):
    """The parameters of a linear layer or of a norm."""

    weight: Array
    bias: Array


class Layers(NamedTuple):
    """What a block knows, and its layers in their order."""

    heads: int
    eps: float
    norm1: Layer
    qkv: Layer
    proj: Layer
    norm2: Layer
    fc1: Layer
    fc2: Layer


def block(module: Any, x: Tensor, *, recompute: bool) -> Tensor:
    """The result of a whole ``vit.Block`` on the CPU. (N, T, D) -> (N, T, D).

    Args:
        recompute: whether the backward pass computes the activations again.
    """
    attn, mlp = module.attn, module.mlp
    parts = [module.norm1, attn.qkv, attn.proj, module.norm2, mlp.fc1, mlp.fc2]
    own: list[Any] = [Layer(**arrays) for arrays in flat.arrays(parts)]
    layers = Layers(attn.heads, module.norm1.eps, *own)
    parameters = [tensor for part in parts for tensor in (part.weight, part.bias)]
    if not flow.is_grad_enabled() or not any(each.requires_grad for each in (x, *parameters)):
        return flow.from_numpy(_block(x.numpy(), layers))
    return recorded(lambda x: _recorded_block(x, layers), x, parameters, recompute=recompute)


def recorded(
    function: Callable[[Array], tuple[Array, Backward]],
    x: Tensor,
    others: Iterable[Tensor],
    *,
    recompute: bool = False,
) -> Tensor:
    """The result of a function, as one operation with gradients of x and of other tensors.

    Args:
        function: gives the result for x, and how to differentiate it.
        recompute: whether the backward pass calls the function again, instead of keeping what it
            has computed.
    """
    kept: list[Any] = []

    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        y, backward = function(x.numpy())
        kept.append(x if recompute else backward)
        return flow.from_numpy(y)

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # What is kept is freed after this call. OneFlow keeps this function as long as the loss.
        one = kept.pop()
        backward = function(one.numpy())[1] if recompute else one
        gradients = backward(grad.numpy())
        return tuple(None if each is None else flow.from_numpy(each) for each in gradients)

    # The context would keep tensors only, each with a wait of its own. A subclass of Function for
    # each call would refer to itself: only the garbage collector would free what it keeps.
    return AutogradFunctionBase.apply("Recorded", forward, differentiate, x, *others)


def _block(x: Array, layers: Layers) -> Array:
    rows = kernels.as_rows(x)
    y, *_ = kernels.normalize_rows(rows, *layers.norm1, layers.eps)
    qkv = kernels.mapped(y, *layers.qkv).reshape(*x.shape[:2], -1)
    mixed = kernels.as_rows(kernels.attend(qkv, layers.heads)[0])
    middle = kernels.mapped(mixed, *layers.proj, rows)
    y, *_ = kernels.normalize_rows(middle, *layers.norm2, layers.eps)
    hidden, _ = kernels.gelu(kernels.mapped(y, *layers.fc1), slope=False)
    return kernels.mapped(hidden, *layers.fc2, middle).reshape(x.shape)


def _recorded_block(x: Array, layers: Layers) -> tuple[Array, Backward]:
    middle, of_attention = _recorded_attention(x, layers)
    y, of_mlp = _recorded_mlp(middle, layers)
    kept = [of_attention, of_mlp]

    def backward(grad: Array) -> list[Array]:
        given, *later = kept.pop()(grad)  # this frees what it kept
        return [*kept.pop()(given), *later]

    return y, backward


def _recorded_attention(x: Array, layers: Layers) -> tuple[Array, Backward]:
    """The first norm and the attention, added to x."""
    rows, shape = kernels.as_rows(x), x.shape  # x itself is not kept
    normal, *kept = kernels.normalize_rows(rows, *layers.norm1, layers.eps)
    qkv = kernels.mapped(normal, *layers.qkv).reshape(*shape[:2], -1)
    mixed, shares = kernels.attend(qkv, layers.heads)
    y = kernels.mapped(kernels.as_rows(mixed), *layers.proj, rows).reshape(shape)

    def backward(grad: Array) -> list[Array]:
        given = kernels.as_rows(grad)
        of_proj = kernels.of_weights(given, kernels.as_rows(mixed))
        inner = kernels.from_outputs(given, layers.proj.weight).reshape(mixed.shape)
        inner = kernels.as_rows(kernels.attend_backward(qkv, shares, inner))
        of_qkv = kernels.of_weights(inner, normal)
        inner = kernels.from_outputs(inner, layers.qkv.weight)
        of_x, *of_norm = kernels.normalize_rows_backward(*kept, layers.norm1.weight, inner, given)
        return [of_x.reshape(shape), *of_norm, *of_qkv, *of_proj]

    return y, backward


def _recorded_mlp(x: Array, layers: Layers) -> tuple[Array, Backward]:
    """The second norm and the MLP, added to x."""
    rows, shape = kernels.as_rows(x), x.shape  # x itself is not kept
    normal, *kept = kernels.normalize_rows(rows, *layers.norm2, layers.eps)
    hidden, slope = kernels.gelu(kernels.mapped(normal, *layers.fc1), slope=True)
    y = kernels.mapped(hidden, *layers.fc2, rows).reshape(shape)

    def backward(grad: Array) -> list[Array]:
        given = kernels.as_rows(grad)
        of_fc2 = kernels.of_weights(given, hidden)
        inner = kernels.from_outputs(given, layers.fc2.weight, slope)
        of_fc1 = kernels.of_weights(inner, normal)
        inner = kernels.from_outputs(inner, layers.fc1.weight)
        of_x, *of_norm = kernels.normalize_rows_backward(*kept, layers.norm2.weight, inner, given)
        return [of_x.reshape(shape), *of_norm, *of_fc1, *of_fc2]

    return y, backward
