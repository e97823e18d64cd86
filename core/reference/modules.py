"""Layers, encoder and heads as functions of (values by canonical name, input).

Shape letters: N images, L tokens, D width, H heads.
"""

import itertools
from collections.abc import Mapping, MutableMapping

import autograd.numpy as np
from autograd.scipy.special import erf
from autograd.tracer import getval

from triptych.core.config.spec import VitSpec
from triptych.core.engine import Tensor

Values = Mapping[str, Tensor]


def linear(values: Values, name: str, x: Tensor) -> Tensor:
    """x W^T + b. (..., in) -> (..., out)."""
    y = x @ values[f"{name}.weight"].T
    return y + values[f"{name}.bias"] if f"{name}.bias" in values else y


def layer_norm(values: Values, name: str, x: Tensor, eps: float) -> Tensor:
    """Over the last axis, biased variance (arXiv 1607.06450)."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    normal = centred / np.sqrt(variance + eps)
    return normal * values[f"{name}.weight"] + values[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), exact (arXiv 1606.08415)."""
    return x * 0.5 * (1.0 + erf(x / np.sqrt(2.0)))


def attention(values: Values, name: str, x: Tensor, heads: int) -> Tensor:
    """Self-attention; qkv is three contiguous thirds, each of contiguous heads. (N, L, D)."""
    n, length, width = x.shape
    qkv = np.reshape(linear(values, f"{name}.qkv", x), (n, length, 3, heads, width // heads))
    q, k, v = np.transpose(qkv, (2, 0, 3, 1, 4))  # each (N, H, L, D/H)
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(width // heads)
    weights = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    weights = weights / np.sum(weights, axis=-1, keepdims=True)
    mixed = np.reshape(np.transpose(weights @ v, (0, 2, 1, 3)), (n, length, width))
    return linear(values, f"{name}.proj", mixed)


def block(values: Values, name: str, x: Tensor, spec: VitSpec) -> Tensor:
    """Pre-norm transformer block. (N, L, D)."""
    eps = spec.layer_norm_eps
    x = x + attention(
        values, f"{name}.attn", layer_norm(values, f"{name}.norm1", x, eps), spec.heads
    )
    hidden = gelu(linear(values, f"{name}.mlp.fc1", layer_norm(values, f"{name}.norm2", x, eps)))
    return x + linear(values, f"{name}.mlp.fc2", hidden)


def patch_embed(values: Values, name: str, images: Tensor, spec: VitSpec) -> Tensor:
    """Non-overlapping patches, row-major, projected. (N, C, H, W) -> (N, L, D)."""
    n, channels = images.shape[:2]
    (rows, columns), p = spec.grid, spec.patch_size
    x = np.reshape(images, (n, channels, rows, p, columns, p))
    x = np.reshape(np.transpose(x, (0, 2, 4, 1, 3, 5)), (n, rows * columns, channels * p * p))
    weight = np.reshape(values[f"{name}.weight"], (spec.width, -1))
    return x @ weight.T + values[f"{name}.bias"]


def vit(values: Values, name: str, images: Tensor, spec: VitSpec) -> dict[str, Tensor]:
    """All tokens, (N, 1+L, D): "patch_embed", "layer<i>" (raw) and "final" (after the norm)."""
    patches = patch_embed(values, f"{name}.patch_embed.proj", images, spec)
    token = np.tile(values[f"{name}.cls_token"], (len(images), 1, 1))
    x = np.concatenate([token, patches], axis=1) + values[f"{name}.pos_embed"]
    found = {"patch_embed": patches}
    for i in range(spec.depth):
        x = block(values, f"{name}.blocks.{i}", x, spec)
        found[f"layer{i}"] = x
    return {**found, "final": layer_norm(values, f"{name}.norm", x, spec.layer_norm_eps)}


def batch_norm(
    values: MutableMapping[str, Tensor],
    name: str,
    x: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Over the rows of (N, D) (arXiv 1502.03167).

    In training the batch's mean and biased variance normalise, and the running statistics move by
    ``momentum`` towards the mean and the unbiased variance.
    """
    if training:
        mean = np.mean(x, axis=0)
        centred = x - mean
        variance = np.mean(centred * centred, axis=0)
        n = len(x)
        for key, batch in (("mean", mean), ("var", variance * n / (n - 1))):
            running = f"{name}.running_{key}"
            values[running] = (1.0 - momentum) * values[running] + momentum * getval(batch)
        values[f"{name}.num_batches_tracked"] = values[f"{name}.num_batches_tracked"] + 1
    else:
        centred, variance = x - values[f"{name}.running_mean"], values[f"{name}.running_var"]
    normal = centred / np.sqrt(variance + eps)
    if f"{name}.weight" not in values:
        return normal
    return normal * values[f"{name}.weight"] + values[f"{name}.bias"]


def mlp(
    values: MutableMapping[str, Tensor], name: str, x: Tensor, layers: int, *, training: bool
) -> Tensor:
    """Projector or predictor: linear, norm, relu, ..., linear, and a norm where there is one."""
    for i in itertools.islice(itertools.count(0, 3), layers):
        x = linear(values, f"{name}.{i}", x)
        if f"{name}.{i + 1}.running_mean" in values:
            x = batch_norm(values, f"{name}.{i + 1}", x, training=training)
        if i < 3 * (layers - 1):
            x = np.maximum(x, 0.0)
    return x
