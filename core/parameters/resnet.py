"""The layers of a residual network and their tensors, under torchvision's names."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from triptych.core.config.spec import ResnetSpec
from triptych.core.parameters.param import ONES, ZEROS, ConvNorm, Init, Param


@dataclass(frozen=True)
class ResidualBlock:
    """A residual block: layers with ReLU between them, added to the input, then ReLU.

    Attributes:
        name: e.g. "layer1.0".
        stage: 0 to 3.
        layers: two, or three in a bottleneck.
        shortcut: layer for the input, if the input and the output of the block differ in shape.
    """

    name: str
    stage: int
    layers: tuple[ConvNorm, ...]
    shortcut: ConvNorm | None


def stem(spec: ResnetSpec) -> ConvNorm:
    """The first layer. ReLU follows it, and for ImageNet a 3x3 max-pooling of stride 2."""
    kernel, stride = (7, 2) if spec.stem == "imagenet" else (3, 1)
    return ConvNorm("conv1", "bn1", spec.channels, spec.width, kernel, stride)


def blocks(spec: ResnetSpec) -> Iterator[ResidualBlock]:
    """All blocks, stage by stage (arXiv 1512.03385, table 1)."""
    before = spec.width
    for stage, depth in enumerate(spec.depths):
        inner = spec.width * 2**stage
        for i in range(depth):
            stride = 2 if stage > 0 and i == 0 else 1
            name, after = f"layer{stage + 1}.{i}", inner * spec.expansion
            layers = _layers(spec, name, (before, inner, after), stride)
            shortcut = None
            if stride != 1 or before != after:
                down = f"{name}.downsample"
                shortcut = ConvNorm(f"{down}.0", f"{down}.1", before, after, 1, stride)
            yield ResidualBlock(name, stage, layers, shortcut)
            before = after


def _layers(
    spec: ResnetSpec, name: str, widths: tuple[int, int, int], stride: int
) -> tuple[ConvNorm, ...]:
    before, inner, after = widths
    # (in, out, kernel, stride). In a bottleneck, the 3x3 convolution has the stride.
    shapes = [(before, inner, 3, stride), (inner, after, 3, 1)]
    if spec.bottleneck:
        shapes = [(before, inner, 1, 1), (inner, inner, 3, stride), (inner, after, 1, 1)]
    return tuple(
        ConvNorm(f"{name}.conv{i}", f"{name}.bn{i}", *shape) for i, shape in enumerate(shapes, 1)
    )


def resnet_params(spec: ResnetSpec) -> list[Param]:
    """All tensors, in the order of torchvision's state dict."""
    first = stem(spec)
    params = first.params(_kaiming(spec, first))
    for block in blocks(spec):
        for layer in block.layers:
            last = layer is block.layers[-1]
            gain = ZEROS if last and spec.zero_init_residual else ONES
            params += layer.params(_kaiming(spec, layer), gain)
        if block.shortcut:
            params += block.shortcut.params(_kaiming(spec, block.shortcut))
    return params


def _kaiming(spec: ResnetSpec, layer: ConvNorm) -> Init:
    """Kaiming-normal for ReLU (arXiv 1502.01852)."""
    fan = layer.kernel**2 * (layer.fan_out if spec.init == "fan_out" else layer.fan_in)
    return Init("normal", math.sqrt(2.0 / fan))
