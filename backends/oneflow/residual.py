"""A residual network in training as one operation in NumPy, which waits for OneFlow's queue once.

Inside it, maps have their channels last. ``fused`` says what the waits would take.

Shape letters: N images, C and D channels, H and W sides of a map, h and w those of a convolution's
result, R virtual ranks.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow import flat, fused, layers, maps, norms
from triptych.backends.oneflow.fused import Backward
from triptych.core.contracts import Array


class Layer(NamedTuple):
    """A convolution, and the batch norm after it."""

    weight: Array
    stride: int
    padding: int
    affine: tuple[Array, Array]
    norm: layers.BatchNorm


class Block(NamedTuple):
    """The layers of a residual block, and that of its shortcut, if it has one."""

    layers: Sequence[Layer]
    shortcut: Layer | None


class Network(NamedTuple):
    """A residual network. ``pool``: whether max-pooling follows the stem."""

    stem: Layer
    pool: bool
    blocks: Sequence[Block]


class Kept(NamedTuple):
    """What a layer keeps for the backward pass.

    Attributes:
        centred: (N, h, w, D), the result of the convolution, as ``maps.centre`` leaves it.
        inverse: (R, D), 1 / standard deviation.
    """

    centred: Array
    inverse: Array


def serve(module: Any, images: Tensor) -> bool:
    """Whether ``pooled`` computes what a network's modules would."""
    if images.dtype != flow.float32 or not layers.in_numpy(images):
        return False
    return all(norm.training for _, norm in _pairs(module))


def pooled(module: Any, images: Tensor) -> Tensor:
    """The result of a whole ``resnet.ResNet``. (N, C, H, W) -> (N, D)."""
    pairs = list(_pairs(module))
    network = _network(module, pairs)
    parameters = [
        tensor for conv, norm in pairs for tensor in (conv.weight, norm.weight, norm.bias)
    ]
    if not flow.is_grad_enabled() or not any(x.requires_grad for x in (images, *parameters)):
        return flow.from_numpy(_pooled(images.numpy(), network))
    of_x = images.requires_grad
    return fused.recorded(lambda x: _recorded(x, network, of_x=of_x), images, parameters)


def _pairs(module: Any) -> Iterator[tuple[layers.Conv2d, layers.BatchNorm]]:
    """The layers of a network: the stem's, and those of each block, its shortcut's last."""
    yield module.conv1, module.bn1
    for block in module.blocks():
        yield from block.pairs()


def _network(module: Any, pairs: Sequence[tuple[Any, Any]]) -> Network:
    arrays = flat.arrays([part for pair in pairs for part in pair])

    def layer(conv: Any, norm: Any) -> Layer:
        (weight,), (gain, shift) = next(arrays).values(), next(arrays).values()
        return Layer(weight, conv.stride[0], conv.padding[0], (gain, shift), norm)

    own = (layer(*pair) for pair in pairs)
    stem = next(own)
    blocks = [
        Block([next(own) for _ in range(block.depth)], next(own) if block.downsample else None)
        for block in module.blocks()
    ]
    return Network(stem, isinstance(module.maxpool, nn.MaxPool2d), blocks)


def _pooled(images: Array, network: Network) -> Array:
    y = _applied(maps.channels_last(images), network.stem)
    y = maps.max_pool(y) if network.pool else y
    for block in network.blocks:
        shortcut = _applied(y, block.shortcut, relu=False) if block.shortcut else y
        for layer in block.layers[:-1]:
            y = _applied(y, layer)
        y = _applied(y, block.layers[-1], shortcut)
    return maps.mean(y)


def _applied(x: Array, layer: Layer, other: Array | None = None, *, relu: bool = True) -> Array:
    kept = _centred(x, layer)
    return maps.scale(*kept, layer.affine, other=other, relu=relu, out=kept.centred)


def _centred(x: Array, layer: Layer) -> Kept:
    """The convolution of a layer, and what its norm finds, which moves its running statistics."""
    y, norm = maps.convolve(x, layer.weight, layer.stride, layer.padding), layer.norm
    norm.check(y.size // y.shape[3])
    found = maps.centre(y, norm.virtual_ranks, norm.eps, norms.total_in_numpy(norm.group))
    mean, variance = flow.from_numpy(found.moments)
    norm.track(mean, variance, found.number)
    return Kept(y, found.inverse)


def _recorded(images: Array, network: Network, *, of_x: bool) -> tuple[Array, Backward]:
    y, of_stem = _recorded_stem(images, network, of_x=of_x)
    kept = [of_stem]
    for block in network.blocks:
        y, of_block = _recorded_block(y, block)
        kept.append(of_block)
    shape = y.shape

    def backward(grad: Array) -> list[Any]:
        given, found = maps.mean_backward(grad, shape), list[Any]()
        while kept:
            given, *own = kept.pop()(given)  # this frees what it kept
            found[:0] = own
        return [given, *found]

    return maps.mean(y), backward


def _recorded_stem(images: Array, network: Network, *, of_x: bool) -> tuple[Array, Backward]:
    x, layer = maps.channels_last(images), network.stem
    kept = _centred(x, layer)
    before = maps.scale(*kept, layer.affine)
    y = maps.max_pool(before) if network.pool else before

    def backward(grad: Array) -> list[Any]:
        before = maps.scale(*kept, layer.affine)  # computed again, which saves its memory
        given = maps.max_pool_backward(before, y, grad) if network.pool else grad
        of_images, *found = _differentiated(x, layer, kept, before, given, of_x=of_x)
        return [maps.channels_first(of_images) if of_x else None, *found]

    return y, backward


def _recorded_block(x: Array, block: Block) -> tuple[Array, Backward]:
    """The backward function overwrites its input."""
    parts, (other, of_other) = block.layers, _recorded_shortcut(x, block.shortcut)
    kept = [_centred(x, parts[0])]
    for layer, following in itertools.pairwise(parts):
        kept.append(_centred(maps.scale(*kept[-1], layer.affine), following))
    y = maps.scale(*kept[-1], parts[-1].affine, other=other)

    def backward(grad: Array) -> list[Any]:
        given, result, found = grad, y, list[Any]()
        for i in reversed(range(len(parts))):
            own = kept.pop()
            # What a layer got from another is computed again, which saves its memory.
            before = maps.scale(*kept[-1], parts[i - 1].affine) if kept else x
            given, *gradients = _differentiated(before, parts[i], own, result, given)
            found[:0], result = gradients, before
        # The last layer has made grad the gradient before ReLU, which is also that of the shortcut.
        of_x, *others = of_other(grad)
        given += of_x
        return [given, *found, *others]

    return y, backward


def _recorded_shortcut(x: Array, layer: Layer | None) -> tuple[Array, Backward]:
    if layer is None:
        return x, lambda grad: [grad]
    kept = _centred(x, layer)
    y = maps.scale(*kept, layer.affine, relu=False)
    return y, lambda grad: _differentiated(x, layer, kept, None, grad)


def _differentiated(
    x: Array, layer: Layer, kept: Kept, y: Array | None, grad: Array, *, of_x: bool = True
) -> list[Any]:
    """The gradients of a layer with respect to x, or None, and to weight, gain and shift.

    Args:
        kept: its centred map is overwritten.
        y: the result, if it went through ReLU.
        grad: of the result; overwritten with the gradient before ReLU.
        of_x: whether x gets a gradient.
    """
    total = norms.total_in_numpy(layer.norm.group)
    of_affine = maps.normalize_backward(*kept, layer.affine[0], y, grad, total)
    shape = layer.stride, layer.padding
    of_conv = maps.convolve_backward(x, layer.weight, kept.centred, *shape, of_x=of_x)
    return [*of_conv, *of_affine]
