"""The tensors of a vision transformer, under timm's names, with MoCo v3's initial values."""

import itertools
import math

from triptych.core.config.spec import VitSpec
from triptych.core.parameters.param import (
    ZEROS,
    ConvNorm,
    Init,
    Param,
    linear,
    norm,
    torch_default,
    xavier,
)


def vit_params(spec: VitSpec) -> list[Param]:
    """All tensors, in forward order. Initial values have the bounds of the official code."""
    token = Init("normal", 0.02 if spec.init == "moca" else 1e-6)
    return [
        Param("cls_token", (1, 1, spec.width), token),
        position_param(spec),
        *(_conv_stem_params(spec) if spec.stem == "conv" else _patch_params(spec)),
        *block_params(spec),
        *norm("fc_norm" if spec.fc_norm else "norm", spec.width),
    ]


def position_param(spec: VitSpec) -> Param:
    """The position table of the class token and the patches."""
    table = Init("sincos", grid=spec.grid, column_first=spec.init == "moca")
    shape, free = (1, 1 + math.prod(spec.grid), spec.width), not spec.freeze_positions
    return Param("pos_embed", shape, table, trainable=free)


def block_params(spec: VitSpec) -> list[Param]:
    """The tensors of all blocks."""
    d, hidden = spec.width, spec.mlp_width
    # The bound of MoCo v3 treats query, key and value as three D x D matrices.
    joint = xavier(d, 3 * d if spec.init == "moca" else d)
    params: list[Param] = []
    for i in range(spec.depth):
        block = f"blocks.{i}."
        params += [
            *norm(block + "norm1", d),
            *linear(block + "attn.qkv", d, 3 * d, joint),
            *linear(block + "attn.proj", d, d, xavier(d, d)),
            *norm(block + "norm2", d),
            *linear(block + "mlp.fc1", d, hidden, xavier(d, hidden)),
            *linear(block + "mlp.fc2", hidden, d, xavier(hidden, d)),
        ]
    return params


def conv_stem(spec: VitSpec) -> list[ConvNorm]:
    """The four convolutions that replace the patch projection (arXiv 2106.14881).

    ReLU follows each. The last layer is ``patch_embed.proj.12``, a 1x1 convolution with bias. The
    names are those of a sequential module.
    """
    widths = [spec.channels, *(spec.width // k for k in (8, 4, 2, 1))]
    return [
        ConvNorm(f"patch_embed.proj.{3 * i}", f"patch_embed.proj.{3 * i + 1}", *pair, 3, 2)
        for i, pair in enumerate(itertools.pairwise(widths))
    ]


def _conv_stem_params(spec: VitSpec) -> list[Param]:
    d, last = spec.width, "patch_embed.proj.12"
    layers = conv_stem(spec)
    return [
        *(p for layer in layers for p in layer.params(torch_default(9 * layer.fan_in))),
        Param(f"{last}.weight", (d, d, 1, 1), torch_default(d)),
        Param(f"{last}.bias", (d,), torch_default(d)),
    ]


def _patch_params(spec: VitSpec) -> list[Param]:
    d, patch = spec.width, spec.patch_size
    fan_in, free = spec.channels * patch**2, not spec.freeze_patch_embed
    weight, shape = "patch_embed.proj.weight", (d, spec.channels, patch, patch)
    bias = torch_default(fan_in) if spec.init == "moca" else ZEROS
    return [
        Param(weight, shape, xavier(fan_in, d), trainable=free),
        Param("patch_embed.proj.bias", (d,), bias, trainable=free),
    ]
