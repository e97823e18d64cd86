"""Vision transformer with timm's names and shapes and the fixed position table of MoCo v3.

Shape letters: N images, L patches, T tokens, D width, H heads.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import oneflow as flow
import oneflow.nn.functional as F
from oneflow import Tensor, nn
from oneflow.utils.checkpoint import checkpoint

from triptych.backends.oneflow import fused, kernels
from triptych.backends.oneflow.layers import (
    BatchNorm,
    Conv2d,
    Gelu,
    LayerNorm,
    PatchEmbed,
)
from triptych.backends.oneflow.ops import mean_tokens
from triptych.backends.oneflow.products import Linear, in_float32, linear, matmul
from triptych.backends.oneflow.sums import like_tokens, pick_tokens
from triptych.core import parameters
from triptych.core.config.spec import VitSpec
from triptych.core.contracts import Group
from triptych.core.methods.transformer import Scales, Transformer


class Attention(nn.Module):
    """Self-attention. (N, T, D) -> (N, T, D).

    Attributes:
        heads: number of heads that this process has.
        group: the processes that share all heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.group = heads, Group()
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Each token attends to all tokens."""
        if in_float32(x):
            return self.proj(_attend_in_numpy(self.qkv(x), self.heads))
        query, key, value = _split_heads(self.qkv(x), 3, self.heads)
        return self.proj(_attend(query, key, value).transpose(1, 2).reshape(*x.shape[:2], -1))


class Mlp(nn.Module):
    """Two linear layers with GELU between them. (N, T, D) -> (N, T, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.act = Gelu()
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps each token separately."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. (N, T, D) -> (N, T, D)."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.norm1 = LayerNorm(spec.width, spec.layer_norm_eps)
        self.attn = Attention(spec.width, spec.heads)
        self.norm2 = LayerNorm(spec.width, spec.layer_norm_eps)
        self.mlp = Mlp(spec.width, spec.mlp_width)

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        """Adds the attention to its input, then the MLP to its input.

        Args:
            recompute: whether the backward pass computes the activations again.
        """
        if in_float32(x) and self.attn.group.count == 1:
            return fused.block(self, x, recompute=recompute)
        return checkpoint(self._added, x) if recompute else self._added(x)

    def _added(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(Transformer, nn.Module):
    """timm's network without its classifier. Parameters have timm's names and shapes.

    Position table and patch projection are trained only if the spec says so.
    """

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        rows, columns = spec.grid
        self.width, self.patch_count = spec.width, rows * columns
        self.patch_embed = PatchEmbed(spec.channels, spec.width, spec.patch_size)
        self.cls_token = nn.Parameter(flow.zeros(1, 1, spec.width))
        self.pos_embed = nn.Parameter(flow.zeros(1, 1 + rows * columns, spec.width))
        self.blocks = nn.Sequential(*[Block(spec) for _ in range(spec.depth)])
        norm, none = LayerNorm(spec.width, spec.layer_norm_eps), nn.Identity()
        self.norm, self.fc_norm = (none, norm) if spec.fc_norm else (norm, none)
        self.pos_embed.requires_grad_(not spec.freeze_positions)
        if spec.stem == "conv":
            self.patch_embed.proj = conv_stem(spec)
        else:
            self.patch_embed.requires_grad_(not spec.freeze_patch_embed)

    def embed(self, images: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        patches = self.patch_embed(images)
        cls_token = self.cls_token.expand(len(patches), -1, -1)
        return flow.cat([cls_token, patches], dim=1) + self.pos_embed

    def embed_some(self, images: Tensor, ids: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        patches = pick_tokens(self.patch_embed(images) + self.pos_embed[:, 1:], ids)
        token = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        return flow.cat([token, patches], dim=1)

    def last_block(self, x: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        return class_token(self.blocks[-1], x)

    def attend(self, x: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        return class_attention(self.blocks[-1], x)

    def mean(self, x: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        return mean_tokens(x, np.arange(1, x.shape[1]))

    def repeated(self, scales: Scales, images: Tensor) -> Scales:
        """See ``core.methods.transformer.Transformer``.

        A product that broadcasts is slow on the CPU.
        """
        like = images.new_zeros((1,)).expand(len(images), 1 + self.patch_count, self.width)
        return [(like_tokens(one, like), like_tokens(two, like)) for one, two in scales]

    def kept(self, layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """See ``core.methods.transformer.Transformer``."""
        if not (self.recompute and flow.is_grad_enabled()):
            return layer
        return (
            partial(layer, recompute=True)
            if isinstance(layer, Block)
            else partial(checkpoint, layer)
        )


def conv_stem(spec: VitSpec) -> nn.Sequential:
    """Convolutions that replace the patch projection. (N, C, H, W) -> (N, D, rows, columns)."""
    layers: list[nn.Module] = []
    for layer in parameters.conv_stem(spec):
        layers += [
            Conv2d(layer.fan_in, layer.fan_out, layer.kernel, layer.stride, 1, bias=False),
            BatchNorm(layer.fan_out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, Conv2d(spec.width, spec.width, 1))


def blocks(spec: VitSpec) -> nn.Sequential:
    """The blocks of a ViT, without embedding and last norm. (N, T, D) -> (N, T, D)."""
    return nn.Sequential(*[Block(spec) for _ in range(spec.depth)])


def class_token(block: Block, x: Tensor) -> Tensor:
    """The class token after a block. (N, T, D) -> (N, D).

    The loss needs only this row of the last block's output, so only this row is computed. Keys and
    values come from all tokens.
    """
    n, attention = len(x), block.attn
    normal = block.norm1(x)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    width = len(weight) // 3  # a process may have some of the heads only
    query = linear(normal[:, 0], weight[:width], bias[:width])
    key_value = linear(normal, weight[width:], bias[width:])
    key, value = _split_heads(key_value, 2, attention.heads)
    mixed = _attend(query.reshape(n, attention.heads, 1, -1), key, value).reshape(n, width)
    x = x[:, 0] + attention.proj(mixed)
    return x + block.mlp(block.norm2(x))


def class_attention(block: Block, x: Tensor) -> Tensor:
    """How strongly the class token attends to each token in a block. (N, T, D) -> (N, H, T)."""
    query, key, _ = _split_heads(block.attn.qkv(block.norm1(x)), 3, block.attn.heads)
    query = query[:, :, :1] * query.shape[-1] ** -0.5
    weights = F.softmax(matmul(query, key, transpose_b=True), dim=-1)[:, :, 0]
    return block.attn.group.gather(weights.transpose(0, 1)).transpose(0, 1)


def _split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(N, T, parts * D) -> ``parts`` of (N, H, T, D/H)."""
    n, t, width = x.shape
    split = x.reshape(n, t, parts, heads, width // (parts * heads)).permute(2, 0, 3, 1, 4)
    # The gradient of indexing would be a part's gradient within a large tensor of zeros.
    return flow.unbind(split, dim=0)


def _attend_in_numpy(qkv: Tensor, heads: int) -> Tensor:
    """Softmax attention of all tokens to all tokens. (N, T, 3 D) -> (N, T, D)."""
    if flow.is_grad_enabled() and qkv.requires_grad:
        return _attention(heads).apply(qkv)
    return flow.from_numpy(kernels.attend(qkv.numpy(), heads)[0])


@cache
def _attention(heads: int) -> type[flow.autograd.Function]:
    class AttentionInNumpy(flow.autograd.Function):
        @staticmethod
        def forward(ctx: object, qkv: Tensor) -> Tensor:
            mixed, weights = kernels.attend(qkv.numpy(), heads)
            ctx.save_for_backward(qkv, flow.from_numpy(weights))
            return flow.from_numpy(mixed)

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            qkv, weights = (saved.numpy() for saved in ctx.saved_tensors)
            return flow.from_numpy(kernels.attend_backward(qkv, weights, grad.numpy()))

    return AttentionInNumpy


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention.

    Args:
        query: (N, H, S, D/H).
        key: (N, H, T, D/H).
        value: (N, H, T, D/H).

    Returns:
        (N, H, S, D/H).
    """
    scores = matmul(query * query.shape[-1] ** -0.5, key, transpose_b=True)
    return matmul(F.softmax(scores, dim=-1), value)
