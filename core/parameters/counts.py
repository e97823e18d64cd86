"""Parameter counts and FLOPs of a run's networks, counted as in the published tables."""

import math
from dataclasses import dataclass

from triptych.core.config.spec import ResnetSpec, RunSpec, SupervisedSpec, VitSpec
from triptych.core.parameters import ConvNorm, Param, blocks, conv_stem, stem, table

PARAMETERS_COUNTED = (
    "student and teacher with all their heads, frozen tensors included, running statistics not; "
    "of a fine-tuning the student alone"
)
FLOPS_COUNTED = (
    "multiply-adds of one image through one encoder, no head; "
    "layer norm 5 per value, batch norm 2, softmax, pooling, GELU and ReLU none"
)


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, without running statistics.

    Attributes:
        total: of student and teacher with all heads, frozen tensors included. Fine-tuning counts
            no teacher, which is a moving average of the weights.
        encoder: of one encoder without a head.
        trainable: of the tensors with a gradient.
    """

    total: int
    encoder: int
    trainable: int


def parameter_counts(spec: RunSpec) -> Counts:
    """The parameter counts of a run, the same on every backend."""
    params = [p for p in table(spec) if not p.buffer]
    if isinstance(spec.method, SupervisedSpec):
        params = [p for p in params if not p.name.startswith("teacher.")]
    return Counts(
        total=_size(params),
        encoder=_size([p for p in params if p.name.startswith("student.encoder.")]),
        trainable=_size([p for p in params if p.trainable]),
    )


def flops(spec: RunSpec) -> int:
    """Multiply-adds of one image through the encoder, counted as in mmpretrain's table.

    The count of each operation:
        convolution, linear layer, both attention products: 1 per multiply-add.
        layer norm: 5 per value.
        batch norm: 2 per value.
        bias, softmax, pooling, GELU, ReLU, residual sum: 0.

    mmpretrain's figures of linear probes of a ResNet count 1 per value of the last feature map
    more, for the mean over it: 100,352 = 7 * 7 * 2048 of a ResNet-50.
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
    """Multiply-adds of all blocks and the last norm for ``tokens`` tokens, as ``flops`` counts."""
    width = model.width
    linear = (4 * width + 2 * model.mlp_width) * tokens * width
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
    """The output (height, width) of a layer, and its multiply-adds."""
    size = _strided(size, layer.kernel, layer.stride)
    return size, math.prod(size) * layer.fan_out * (layer.fan_in * layer.kernel**2 + 2)


def _strided(size: tuple[int, int], kernel: int, stride: int) -> tuple[int, int]:
    height, width = ((side + 2 * (kernel // 2) - kernel) // stride + 1 for side in size)
    return height, width


def _size(params: list[Param]) -> int:
    return sum(p.size for p in params)
