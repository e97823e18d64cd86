"""A stage of a residual network as one operation in NumPy, which waits for OneFlow's queue once.

Inside it, maps have their channels last. ``fused`` says what the waits would take.

Shape letters: N images, C and D channels, H and W sides of a map, h and w those of the result, R
virtual ranks, M rows of a rank.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow import flat, fused, layers, maps, norms
from triptych.backends.oneflow.fused import Backward
from triptych.core.contracts import Array

Pair = tuple[layers.Conv2d, layers.BatchNorm]
"""The modules of a layer."""


class Layer(NamedTuple):
    """A convolution, and the batch norm after it."""

    weight: Array
    affine: tuple[Array, Array]
    stride: int
    padding: int
    norm: layers.BatchNorm


class Block(NamedTuple):
    """The layers of a residual block, and that of its shortcut, which may have none."""

    inner: Sequence[Layer]
    shortcut: Layer | None


def serve(x: Tensor, modules: Iterable[nn.Module]) -> bool:
    """Whether to compute with the functions here what modules would. They are for training."""
    return x.dtype == flow.float32 and layers.in_numpy(x) and all(m.training for m in modules)


def stem(pair: Pair, x: Tensor, *, pool: bool) -> Tensor:
    """A convolution with its norm, ReLU, and max-pooling if ``pool`` is set. As ``stage``."""
    (layer,) = _layers([pair])
    parameters = _parameters([pair])
    if not _is_recorded(x, *parameters):
        return flow.from_numpy(_stem(x.numpy(), layer, pool=pool))
    of_x = x.requires_grad
    return fused.recorded(lambda x: _recorded_stem(x, layer, pool, of_x), x, parameters)


def stage(modules: Sequence[Any], x: Tensor) -> Tensor:
    """The result of blocks, one after the other. (N, C, H, W) -> (N, D, h, w).

    Args:
        modules: each a ``resnet.Block``.
    """
    pairs = [pair for module in modules for pair in module.pairs()]
    parameters = _parameters(pairs)
    own = iter(_layers(pairs))
    blocks = []
    for module in modules:
        inner = [next(own) for _ in range(module.depth)]
        blocks.append(Block(inner, next(own) if module.downsample else None))
    if not _is_recorded(x, *parameters):
        return flow.from_numpy(_stage(x.numpy(), blocks))
    return fused.recorded(lambda x: _recorded_stage(x, blocks), x, parameters)


def _layers(pairs: Sequence[Pair]) -> list[Layer]:
    arrays = iter(list(flat.arrays([module for pair in pairs for module in pair])))
    found = []
    for conv, norm in pairs:
        (weight,), (gain, shift) = next(arrays).values(), next(arrays).values()
        found.append(Layer(weight, (gain, shift), conv.stride[0], conv.padding[0], norm))
    return found


def _parameters(pairs: Sequence[Pair]) -> list[Tensor]:
    return [tensor for conv, norm in pairs for tensor in (conv.weight, norm.weight, norm.bias)]


def _is_recorded(*tensors: Tensor) -> bool:
    return flow.is_grad_enabled() and any(each.requires_grad for each in tensors)


def _stem(x: Array, layer: Layer, *, pool: bool) -> Array:
    y = _apply(maps.channels_last(x), layer)
    return maps.channels_first(maps.max_pool(y) if pool else y)


def _recorded_stem(x: Array, layer: Layer, pool: bool, of_x: bool) -> tuple[Array, Backward]:
    y, of_layer = _recorded_layer(maps.channels_last(x), layer, of_x=of_x)
    pooled = maps.max_pool(y) if pool else y
    kept = [of_layer]

    def backward(grad: Array) -> list[Array | None]:
        given = maps.channels_last(grad)
        of_y = maps.max_pool_backward(y, pooled, given) if pool else given
        given, *found = kept.pop()(of_y)
        return [None if given is None else maps.channels_first(given), *found]

    return maps.channels_first(pooled), backward


def _stage(x: Array, blocks: Sequence[Block]) -> Array:
    y = maps.channels_last(x)
    for block in blocks:
        shortcut = y if block.shortcut is None else _apply(y, block.shortcut, relu=False)
        for layer in block.inner[:-1]:
            y = _apply(y, layer)
        y = _apply(y, block.inner[-1], shortcut)
    return maps.channels_first(y)


def _recorded_stage(x: Array, blocks: Sequence[Block]) -> tuple[Array, Backward]:
    y = maps.channels_last(x)
    kept: list[Backward] = []
    for block in blocks:
        y, of_block = _recorded_block(y, block)
        kept.append(of_block)

    def backward(grad: Array) -> list[Array]:
        given, found = maps.channels_last(grad), list[Array]()
        while kept:
            given, *own = kept.pop()(given)  # this frees what it kept
            found[:0] = own
        return [maps.channels_first(given), *found]

    return maps.channels_first(y), backward


def _recorded_block(x: Array, block: Block) -> tuple[Array, Backward]:
    """The backward function overwrites its input."""
    y, other, kept = x, x, []
    if block.shortcut:
        other, of_shortcut = _recorded_layer(x, block.shortcut, relu=False)
    for layer in block.inner[:-1]:
        y, of_layer = _recorded_layer(y, layer)
        kept.append(of_layer)
    y, of_layer = _recorded_layer(y, block.inner[-1], other)
    kept.append(of_layer)

    def backward(grad: Array) -> list[Array]:
        given, found = grad, list[Array]()
        while kept:
            # The last layer makes grad the gradient before ReLU: also that of the shortcut.
            given, *own = kept.pop()(given)
            found[:0] = own
        of_x, *others = of_shortcut(grad) if block.shortcut else [grad]
        given += of_x
        return [given, *found, *others]

    return y, backward


def _apply(x: Array, layer: Layer, other: Array | None = None, *, relu: bool = True) -> Array:
    y = maps.convolve(x, layer.weight, layer.stride, layer.padding)
    return _normalized(y, layer, other, keep=False, relu=relu).y.reshape(y.shape)


def _recorded_layer(
    x: Array, layer: Layer, other: Array | None = None, *, relu: bool = True, of_x: bool = True
) -> tuple[Array, Backward]:
    """The backward function overwrites its input with the gradient before ReLU."""
    weight, affine, stride, padding, norm = layer
    centred = maps.convolve(x, weight, stride, padding)
    y, inverse, *_ = _normalized(centred, layer, other, keep=True, relu=relu)
    after = y if relu else None

    def backward(grad: Array) -> list[Array]:
        rows = _by_rank(centred, norm), after, affine[0], inverse, _by_rank(grad, norm)
        of_affine = maps.normalize_backward(*rows, norms.total_in_numpy(norm.group))
        # What was centred is now the gradient of the convolution's result.
        of_conv = maps.convolve_backward(x, weight, centred, stride, padding, of_x=of_x)
        return [*of_conv, *of_affine]

    return y.reshape(centred.shape), backward


def _normalized(
    x: Array, layer: Layer, other: Array | None, *, keep: bool, relu: bool
) -> maps.Normal:
    """The norm of a layer, which moves its running statistics. See ``maps.normalize``."""
    norm = layer.norm
    norm.check(x.size // x.shape[3])
    normal = maps.normalize(
        _by_rank(x, norm),
        layer.affine,
        norm.eps,
        keep=keep,
        relu=relu,
        other=None if other is None else _by_rank(other, norm),
        total=norms.total_in_numpy(norm.group),
    )
    norm.track(*flow.from_numpy(normal.statistics), normal.count)
    return normal


def _by_rank(x: Array, norm: layers.BatchNorm) -> Array:
    """(N, H, W, C) -> (R, M, C), without a copy."""
    n, height, width, channels = x.shape
    return x.reshape(norm.virtual_ranks, n // norm.virtual_ranks * height * width, channels)
