"""What a run's networks weigh and cost, counted as the published tables count."""

import math
from dataclasses import dataclass

from triptych.core.config.spec import ResnetSpec, RunSpec, VitSpec
from triptych.core.parameters import ConvNorm, Param, blocks, conv_stem, stem, table

PARAMETERS_COUNTED = (
    "student and teacher with all their heads, frozen tensors included, running statistics not"
)
FLOPS_COUNTED = (
    "multiply-adds of one image through one encoder, no head; "
    "layer norm 5 per value, batch norm 2, softmax, pooling, GELU and ReLU none"
)


@dataclass(frozen=True)
class Counts:
    """Numbers of values in parameters; running statistics are none."""

    total: int
    """Student, teacher and predictor, frozen tensors included."""
    encoder: int
    """One encoder without a head."""
    trainable: int
    """Tensors with a gradient."""


def parameter_counts(spec: RunSpec) -> Counts:
    """Counted from the canonical table, so it is true for every backend."""
    params = [p for p in table(spec) if not p.buffer]
    return Counts(
        total=_size(params),
        encoder=_size([p for p in params if p.name.startswith("student.encoder.")]),
        trainable=_size([p for p in params if p.trainable]),
    )


def flops(spec: RunSpec) -> int:
    """Multiply-adds of one image through the encoder, as mmpretrain's table counts them.

    Convolutions, linear layers and both attention products count one per multiply-add, a layer
    norm five per value, a batch norm two; bias, softmax, pooling, GELU, ReLU and residual sums
    count nothing.
    """
    return _vit_flops(spec.model) if isinstance(spec.model, VitSpec) else _resnet_flops(spec.model)


def _vit_flops(model: VitSpec) -> int:
    width, patches = model.width, math.prod(model.grid)
    embed = patches * model.channels * model.patch_size**2 * width
    if model.stem == "conv":
        size, embed = model.size, patches * width**2
        for layer in conv_stem(model):
            size, cost = _conv_norm_flops(layer, size)
            embed += cost
    return embed + block_flops(model, patches + 1)


def block_flops(model: VitSpec, tokens: int) -> int:
    """Multiply-adds of some tokens through all blocks and the last norm, as ``flops`` counts."""
    width = model.width
    linear = (4 + 2 * model.mlp_ratio) * tokens * width**2
    attention = 2 * tokens**2 * width
    norms = (2 * model.depth + 1) * tokens * width * 5
    return model.depth * (linear + attention) + norms


def _resnet_flops(model: ResnetSpec) -> int:
    size, total = _conv_norm_flops(stem(model), model.size)
    if model.stem == "imagenet":
        size = _strided(size, 3, 2)
    for block in blocks(model):
        if block.shortcut:
            total += _conv_norm_flops(block.shortcut, size)[1]
        for layer in block.layers:
            size, cost = _conv_norm_flops(layer, size)
            total += cost
    return total


def _conv_norm_flops(layer: ConvNorm, size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """The (height, width) that leaves a layer, and what the layer costs."""
    size = _strided(size, layer.kernel, layer.stride)
    return size, math.prod(size) * layer.fan_out * (layer.fan_in * layer.kernel**2 + 2)


def _strided(size: tuple[int, int], kernel: int, stride: int) -> tuple[int, int]:
    height, width = ((side + 2 * (kernel // 2) - kernel) // stride + 1 for side in size)
    return height, width


def _size(params: list[Param]) -> int:
    return sum(p.size for p in params)
