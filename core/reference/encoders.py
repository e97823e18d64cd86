"""Encoders as functions of (values by canonical name, images).

Each returns tokens by name, all (N, 1+L, D):
    "layer<i>": raw output of a block (ViT) or a stage (ResNet).
    "final": final tokens. The first one is the feature of the image.

Shape letters: N images, C channels, L tokens, D width, H heads.
"""

from collections.abc import MutableMapping, Sequence

import autograd.numpy as np

from triptych.core import parameters
from triptych.core.config.spec import ModelSpec, ResnetSpec, VitSpec
from triptych.core.contracts import Array, Tensor
from triptych.core.parameters import ConvNorm, ResidualBlock
from triptych.core.reference.layers import (
    EVALUATION,
    Norms,
    Values,
    batch_norm,
    convolution,
    gelu,
    layer_norm,
    linear,
    max_pool,
    relu,
)


def encode(
    values: MutableMapping[str, Tensor], name: str, images: Tensor, spec: ModelSpec, norms: Norms
) -> dict[str, Tensor]:
    """The tokens of the encoder that the spec names."""
    if isinstance(spec, VitSpec):
        return vit(values, name, images, spec, norms)
    return resnet(values, name, images, spec, norms)


def attention(values: Values, name: str, x: Tensor, heads: int) -> Tensor:
    """Self-attention. (N, L, D) -> (N, L, D).

    qkv has three contiguous thirds, and each third has contiguous heads.
    """
    n, length, width = x.shape
    weights, v = attention_weights(values, name, x, heads)
    mixed = np.reshape(np.transpose(weights @ v, (0, 2, 1, 3)), (n, length, width))
    return linear(values, f"{name}.proj", mixed)


def attention_weights(values: Values, name: str, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The weights of self-attention (N, H, L, L), and its values (N, H, L, D/H).

    x: (N, L, D).
    """
    n, length, width = x.shape
    qkv = np.reshape(linear(values, f"{name}.qkv", x), (n, length, 3, heads, width // heads))
    q, k, v = np.transpose(qkv, (2, 0, 3, 1, 4))  # each (N, H, L, D/H)
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(width // heads)
    weights = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    return weights / np.sum(weights, axis=-1, keepdims=True), v


def block(
    values: Values, name: str, x: Tensor, spec: VitSpec, scales: Sequence[Tensor] = (1.0, 1.0)
) -> Tensor:
    """Pre-norm transformer block. (N, L, D) -> (N, L, D).

    Args:
        scales: factors (N, 1, 1) of the two residual branches, attention and MLP.
    """
    eps = spec.layer_norm_eps
    x = x + scales[0] * attention(
        values, f"{name}.attn", layer_norm(values, f"{name}.norm1", x, eps), spec.heads
    )
    hidden = gelu(linear(values, f"{name}.mlp.fc1", layer_norm(values, f"{name}.norm2", x, eps)))
    return x + scales[1] * linear(values, f"{name}.mlp.fc2", hidden)


def patch_embed(values: Values, name: str, images: Tensor, spec: VitSpec) -> Tensor:
    """Projects non-overlapping patches, row-major. (N, C, H, W) -> (N, L, D)."""
    n, channels = images.shape[:2]
    (rows, columns), p = spec.grid, spec.patch_size
    x = np.reshape(images, (n, channels, rows, p, columns, p))
    x = np.reshape(np.transpose(x, (0, 2, 4, 1, 3, 5)), (n, rows * columns, channels * p * p))
    weight = np.reshape(values[f"{name}.weight"], (spec.width, -1))
    return x @ weight.T + values[f"{name}.bias"]


def conv_stem(
    values: MutableMapping[str, Tensor], name: str, images: Tensor, spec: VitSpec, norms: Norms
) -> Tensor:
    """Convolutions that replace the patch projection. (N, C, H, W) -> (N, L, D)."""
    x = images
    for layer in parameters.conv_stem(spec):
        x = relu(conv_norm(values, name, layer, x, norms))
    tokens = _tokens(x)
    last = f"{name}.patch_embed.proj.12"
    return tokens @ values[f"{last}.weight"][:, :, 0, 0].T + values[f"{last}.bias"]


def vit(
    values: MutableMapping[str, Tensor],
    name: str,
    images: Tensor,
    spec: VitSpec,
    norms: Norms = EVALUATION,
    scales: Sequence[Sequence[Tensor]] = (),
) -> dict[str, Tensor]:
    """A vision transformer.

    The result also has "patch_embed", (N, L, D): the patch tokens before positions are added; and
    "embedded", (N, 1+L, D): the input of the first block. With ``fc_norm`` the final tokens are
    those of the last block: ``pooled`` normalises their mean.

    Args:
        scales: of each block, as in ``block``; empty: all are 1.
    """
    if spec.stem == "conv":
        patches = conv_stem(values, name, images, spec, norms)
    else:
        patches = patch_embed(values, f"{name}.patch_embed.proj", images, spec)
    token = np.tile(values[f"{name}.cls_token"], (len(images), 1, 1))
    x = np.concatenate([token, patches], axis=1) + values[f"{name}.pos_embed"]
    tokens = {"patch_embed": patches, "embedded": x}
    for i, pair in enumerate(scales or [(1.0, 1.0)] * spec.depth):
        x = block(values, f"{name}.blocks.{i}", x, spec, pair)
        tokens[f"layer{i}"] = x
    if not spec.fc_norm:
        x = layer_norm(values, f"{name}.norm", x, spec.layer_norm_eps)
    return {**tokens, "final": x}


def class_attention(
    values: MutableMapping[str, Tensor], name: str, images: Tensor, spec: VitSpec
) -> Tensor:
    """See ``core.contracts.MaskedEncoder``. (N, C, H, W) -> (N, H, 1+L)."""
    tokens = vit(values, name, images, spec)
    x = tokens[f"layer{spec.depth - 2}"] if spec.depth > 1 else tokens["embedded"]
    last = f"{name}.blocks.{spec.depth - 1}"
    normal = layer_norm(values, f"{last}.norm1", x, spec.layer_norm_eps)
    weights, _ = attention_weights(values, f"{last}.attn", normal, spec.heads)
    return weights[:, :, 0]


def pooled(
    values: MutableMapping[str, Tensor],
    name: str,
    images: Tensor,
    spec: ModelSpec,
    pooling: str,
    norms: Norms,
    scales: Sequence[Sequence[Tensor]] = (),
) -> Tensor:
    """The feature of each image (see ``core.contracts.Encoder``). (N, C, H, W) -> (N, D)."""
    if not isinstance(spec, VitSpec):
        return resnet(values, name, images, spec, norms)["final"][:, 0]
    tokens = vit(values, name, images, spec, norms, scales)["final"]
    feature = tokens[:, 0] if pooling == "cls" else np.mean(tokens[:, 1:], axis=1)
    if spec.fc_norm:
        feature = layer_norm(values, f"{name}.fc_norm", feature, spec.layer_norm_eps)
    return feature


def masked_vit(
    values: MutableMapping[str, Tensor], name: str, images: Tensor, ids: Array, spec: VitSpec
) -> list[Tensor]:
    """The tokens of the visible patches: the output of each block, then that of the final norm.

    Positions are added before patches are omitted.

    Args:
        ids: (N, T) int64, visible patches of each image.

    Returns:
        ``depth`` + 1 tensors (N, 1+T, D).
    """
    table = values[f"{name}.pos_embed"]
    patches = patch_embed(values, f"{name}.patch_embed.proj", images, spec) + table[:, 1:]
    patches = patches[np.arange(len(ids))[:, None], ids]
    token = np.tile(values[f"{name}.cls_token"] + table[:, :1], (len(images), 1, 1))
    x = np.concatenate([token, patches], axis=1)
    outputs = []
    for i in range(spec.depth):
        x = block(values, f"{name}.blocks.{i}", x, spec)
        outputs.append(x)
    return [*outputs, layer_norm(values, f"{name}.norm", x, spec.layer_norm_eps)]


def conv_norm(
    values: MutableMapping[str, Tensor], name: str, layer: ConvNorm, x: Tensor, norms: Norms
) -> Tensor:
    """A convolution and its batch norm. ``name`` is that of the encoder."""
    weight = values[f"{name}.{layer.conv}.weight"]
    x = convolution(weight, x, stride=layer.stride, padding=layer.padding)
    return batch_norm(values, f"{name}.{layer.norm}", x, norms)


def residual_block(
    values: MutableMapping[str, Tensor], name: str, block: ResidualBlock, x: Tensor, norms: Norms
) -> Tensor:
    """Two or three convolutions, added to the input. ``name`` is that of the encoder."""
    y = x
    for i, layer in enumerate(block.layers):
        y = conv_norm(values, name, layer, relu(y) if i else y, norms)
    shortcut = conv_norm(values, name, block.shortcut, x, norms) if block.shortcut else x
    return relu(y + shortcut)


def resnet(
    values: MutableMapping[str, Tensor],
    name: str,
    images: Tensor,
    spec: ResnetSpec,
    norms: Norms = EVALUATION,
) -> dict[str, Tensor]:
    """A residual network. The mean over a feature map comes first, in place of a class token."""
    x = relu(conv_norm(values, name, parameters.stem(spec), images, norms))
    if spec.stem == "imagenet":
        x = max_pool(x)
    maps = {}
    for plan in parameters.blocks(spec):
        x = residual_block(values, name, plan, x, norms)
        maps[f"layer{plan.stage}"] = x
    tokens = {key: _tokens(value) for key, value in maps.items()}
    tokens = {k: np.concatenate([t.mean(1, keepdims=True), t], axis=1) for k, t in tokens.items()}
    return {**tokens, "final": tokens["layer3"]}


def _tokens(x: Tensor) -> Tensor:
    """The positions of a feature map, row by row. (N, C, H, W) -> (N, H*W, C)."""
    return np.swapaxes(np.reshape(x, (*x.shape[:2], -1)), 1, 2)
