"""Vision transformer with timm's names and shapes and the fixed position table of MoCo v3.

Shape letters: N images, L patches, T tokens, D width, H heads.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer, PyLayerContext
from paddle.distributed.fleet.utils import recompute
from paddle.nn.initializer import Constant

from triptych.backends.paddle.kernels import exp
from triptych.backends.paddle.layers import (
    BatchNorm,
    Conv2D,
    Gelu,
    LayerNorm,
    Linear,
    PatchEmbed,
    ReLU,
    like_tokens,
    linear,
    pick_tokens,
    plain_forms_serve,
)
from triptych.backends.paddle.ops import mean_tokens
from triptych.core import parameters
from triptych.core.config.spec import VitSpec
from triptych.core.methods.transformer import Scales, Transformer

SAFE_SUM = 1e12
"""Up to this sum of exp(scores), and down to its inverse, the scores are used as they are."""


class Attention(nn.Layer):
    """Self-attention. (N, T, D) -> (N, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Each token attends to all tokens."""
        query, key, value = _split_heads(self.qkv(x), 3, self.heads)
        return self.proj(_attend_merged(query, key, value))


class Mlp(nn.Layer):
    """Two linear layers with GELU between them. (N, T, D) -> (N, T, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.act = Gelu()
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps each token separately."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Layer):
    """Pre-norm transformer block. (N, T, D) -> (N, T, D)."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.norm1 = LayerNorm(spec.width, spec.layer_norm_eps)
        self.attn = Attention(spec.width, spec.heads)
        self.norm2 = LayerNorm(spec.width, spec.layer_norm_eps)
        self.mlp = Mlp(spec.width, spec.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        """Adds the attention to its input, then the MLP to its input."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(Transformer, nn.Layer):
    """timm's network without its classifier. Parameters have timm's names.

    Position table and patch projection are trained only if the spec says so.
    """

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        rows, columns = spec.grid
        self.width, self.patch_count = spec.width, rows * columns
        zeros = Constant(0.0)
        self.cls_token = self.create_parameter([1, 1, spec.width], default_initializer=zeros)
        self.pos_embed = self.create_parameter(
            [1, 1 + rows * columns, spec.width], default_initializer=zeros
        )
        self.patch_embed = PatchEmbed(spec.channels, spec.width, spec.patch_size)
        self.blocks = nn.LayerList([Block(spec) for _ in range(spec.depth)])
        norm, none = LayerNorm(spec.width, spec.layer_norm_eps), nn.Identity()
        self.norm, self.fc_norm = (none, norm) if spec.fc_norm else (norm, none)
        self.pos_embed.stop_gradient = spec.freeze_positions
        if spec.stem == "conv":
            self.patch_embed.proj = conv_stem(spec)
        else:
            for parameter in self.patch_embed.parameters():
                parameter.stop_gradient = spec.freeze_patch_embed

    def embed(self, images: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        patches = self.patch_embed(images)
        # Not expand_as: paddle2onnx takes the number of images for a constant there.
        x = paddle.concat([self.cls_token.expand([patches.shape[0], -1, -1]), patches], axis=1)
        # Expanded first: a sum that broadcasts over the first axis takes twenty times as long.
        return x + self.pos_embed.expand([x.shape[0], -1, -1])

    def embed_some(self, images: Tensor, ids: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        patches = self.patch_embed(images)
        patches = pick_tokens(patches + self.pos_embed[:, 1:].expand_as(patches), ids)
        token = (self.cls_token + self.pos_embed[:, :1]).expand_as(patches[:, :1])
        return paddle.concat([token, patches], axis=1)

    def last_block(self, x: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        return class_token(self.blocks[-1], x)

    def attend(self, x: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        return class_attention(self.blocks[-1], x)

    def mean(self, x: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        if plain_forms_serve(x):  # mixed precision would round a product
            return x[:, 1:].mean(1)
        return mean_tokens(x, np.arange(1, x.shape[1]))

    def repeated(self, scales: Scales, images: Tensor) -> Scales:
        """See ``core.methods.transformer.Transformer``.

        A product that broadcasts is slow on the CPU.
        """
        like = paddle.empty([len(images), 1 + self.patch_count, self.width], images.dtype)
        return [(like_tokens(one, like), like_tokens(two, like)) for one, two in scales]

    def kept(self, layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """See ``core.methods.transformer.Transformer``."""
        if not (self.recompute and paddle.is_grad_enabled()):
            return layer
        # The other form (use_reentrant=False) gives wrong gradients with operations in place.
        return partial(recompute, layer, use_reentrant=True, preserve_rng_state=False)


def conv_stem(spec: VitSpec) -> nn.Sequential:
    """Convolutions that replace the patch projection. (N, C, H, W) -> (N, D, rows, columns)."""
    layers: list[nn.Layer] = []
    for layer in parameters.conv_stem(spec):
        layers += [
            Conv2D(layer.fan_in, layer.fan_out, layer.kernel, layer.stride, 1, bias=False),
            BatchNorm(layer.fan_out),
            ReLU(),
        ]
    return nn.Sequential(*layers, Conv2D(spec.width, spec.width, 1))


def blocks(spec: VitSpec) -> nn.Sequential:
    """The blocks of a ViT, without embedding and last norm. (N, T, D) -> (N, T, D)."""
    return nn.Sequential(*[Block(spec) for _ in range(spec.depth)])


def class_token(block: Block, x: Tensor) -> Tensor:
    """The class token after a block. (N, T, D) -> (N, D).

    The loss needs only this row of the last block's output, so only this row is computed. Keys and
    values come from all tokens. A process may have some of the heads only.
    """
    attention = block.attn
    heads, third = attention.heads, attention.qkv.weight.shape[1] // 3
    normal = block.norm1(x)
    weights = paddle.split(attention.qkv.weight, [third, 2 * third], axis=1)
    biases = paddle.split(attention.qkv.bias, [third, 2 * third])
    query = linear(normal[:, 0], weights[0], biases[0]).reshape([-1, heads, 1, third // heads])
    key, value = _split_heads(linear(normal, weights[1], biases[1]), 2, heads)
    x = x[:, 0] + attention.proj(_attend_merged(query, key, value)[:, 0])
    return x + block.mlp(block.norm2(x))


def class_attention(block: Block, x: Tensor) -> Tensor:
    """How strongly the class token attends to each token in a block. (N, T, D) -> (N, H, T)."""
    query, key, _ = _split_heads(block.attn.qkv(block.norm1(x)), 3, block.attn.heads)
    query = query[:, :, :1] * query.shape[-1] ** -0.5
    return F.softmax(paddle.matmul(query, key, transpose_y=True))[:, :, 0]


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention.

    Args:
        query: (N, H, S, D/H).
        key: (N, H, T, D/H).
        value: (N, H, T, D/H).

    Returns:
        (N, H, S, D/H).
    """
    if _fused_attention_serves(query):
        parts = (x.transpose([0, 2, 1, 3]) for x in (query, key, value))
        return F.scaled_dot_product_attention(*parts).transpose([0, 2, 1, 3])
    scores = paddle.matmul(query * query.shape[-1] ** -0.5, key, transpose_y=True)
    return paddle.matmul(F.softmax(scores), value)


def _attend_merged(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``_attend`` of arguments like these, with merged heads. (N, S, D)."""
    # float64 keeps its bits.
    if query.dtype == paddle.float32 and not plain_forms_serve(query):
        return _Attention.apply(query, key, value)
    return _merge_heads(_attend(query, key, value))


def _fused_attention_serves(x: Tensor) -> bool:
    """Whether to take Paddle's fused kernel, which does not keep a weight for each pair of tokens.

    It is made for 16 bits on a GPU, the only place where they occur here.
    """
    return x.dtype == paddle.bfloat16


def _split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(N, T, parts * D) -> ``parts`` of (N, H, T, D/H).

    On the CPU, the heads of the tokens are gathered as rows. Paddle's transpose moves numbers one
    by one there, which takes longer than the attention itself.
    """
    if plain_forms_serve(x):
        return x.reshape([0, 0, parts, heads, -1]).transpose([2, 0, 3, 1, 4]).unbind(0)
    return _SplitHeads.apply(x, parts, heads)


def _merge_heads(x: Tensor) -> Tensor:
    """(N, H, T, D/H) -> (N, T, D)."""
    if plain_forms_serve(x):
        return x.transpose([0, 2, 1, 3]).flatten(2)
    return _MergeHeads.apply(x)


class _SplitHeads(PyLayer):
    """``_split_heads`` as gathers of rows."""

    @staticmethod
    def forward(ctx: PyLayerContext, x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
        n, t, width = x.shape
        ctx.shape, ctx.rows = x.shape, _head_rows(n, t, parts, heads, x.place)
        rows = x.reshape([-1, width // (parts * heads)])
        shape = [n, heads, t, rows.shape[1]]
        return tuple(paddle.gather(rows, index).reshape(shape) for index in ctx.rows[0])

    @staticmethod
    def backward(ctx: PyLayerContext, *grads: Tensor) -> Tensor:
        rows = paddle.concat([grad.reshape([-1, grad.shape[-1]]) for grad in grads])
        return paddle.gather(rows, ctx.rows[1]).reshape(ctx.shape)


class _MergeHeads(PyLayer):
    """``_merge_heads`` as a gather of rows."""

    @staticmethod
    def forward(ctx: PyLayerContext, x: Tensor) -> Tensor:
        n, heads, t, width = x.shape
        ctx.shape, ctx.rows = x.shape, _head_rows(n, t, 1, heads, x.place)
        rows = paddle.gather(x.reshape([-1, width]), ctx.rows[1])
        return rows.reshape([n, t, heads * width])

    @staticmethod
    def backward(ctx: PyLayerContext, grad: Tensor) -> Tensor:
        rows = grad.reshape([-1, ctx.shape[-1]])
        return paddle.gather(rows, ctx.rows[0][0]).reshape(ctx.shape)


class _Attention(PyLayer):
    """``_attend_merged`` in fewer operations on all pairs of tokens.

    exp(scores) are the weights up to one factor for each query. It multiplies the result, and in
    the backward pass its gradient, which have fewer numbers than the weights.
    """

    @staticmethod
    def forward(ctx: PyLayerContext, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        n, heads, t, width = query.shape
        query = query * width**-0.5
        weights = exp(paddle.matmul(query, key, transpose_y=True))
        factors = 1.0 / _row_sums(weights)
        # Large scores overflow, small ones underflow. Nan and infinity are no less than the bound.
        if not float((factors + 1.0 / factors).sum()) < SAFE_SUM:
            weights = F.softmax(paddle.matmul(query, key, transpose_y=True))
            factors = paddle.ones_like(factors)
        mixed = paddle.matmul(weights, value)
        rows = mixed.multiply_(paddle.expand(factors, mixed.shape)).reshape([-1, width])
        ctx.rows = _head_rows(n, t, 1, heads, query.place)
        merged = paddle.gather(rows, ctx.rows[1]).reshape([n, t, heads * width])
        ctx.save_for_backward(query, key, value, weights, factors, merged)
        return merged

    @staticmethod
    def backward(ctx: PyLayerContext, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, weights, factors, merged = ctx.saved_tensor()
        width = query.shape[-1]
        rows = grad.reshape([-1, width])
        there = ctx.rows[0][0]
        grad = paddle.gather(rows, there).reshape(query.shape)
        grad.multiply_(paddle.expand(factors, grad.shape))
        # The gradient of a query's scores is its weights times (gradient of the weight - mean),
        # where the mean is the product of the result and its gradient.
        means = _row_sums(rows * merged.reshape(rows.shape))
        means = paddle.gather(means, there).reshape(factors.shape).multiply_(factors)
        left = paddle.concat([grad, -means], -1)
        right = paddle.concat([value, paddle.ones([*value.shape[:-1], 1], value.dtype)], -1)
        of_scores = paddle.matmul(left, right, transpose_y=True).multiply_(weights)
        of_query = paddle.matmul(of_scores, key).scale_(width**-0.5)
        of_key = paddle.matmul(of_scores, query, transpose_x=True)
        return of_query, of_key, paddle.matmul(weights, grad, transpose_x=True)


def _row_sums(x: Tensor) -> Tensor:
    """The sums over the last axis, which stays with length 1."""
    ones = paddle.ones([x.shape[-1], 1], x.dtype)
    return paddle.matmul(x.reshape([-1, x.shape[-1]]), ones).reshape([*x.shape[:-1], 1])


@lru_cache(maxsize=16)
def _head_rows(
    n: int, t: int, parts: int, heads: int, place: Any
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Indices that reorder rows.

    Args:
        place: device of the indices.

    Returns:
        For each part the index from the order (n, t, part, head) to the order (n, head, t).
        The index from the concatenated parts back to the first order.
    """
    rows = np.arange(n * t * parts * heads, dtype=np.int32).reshape(n, t, parts, heads)
    order = rows.transpose(2, 0, 3, 1).reshape(parts, -1)
    back = np.argsort(order.reshape(-1)).astype(np.int32)
    there = tuple(paddle.to_tensor(part, place=place) for part in order)
    return there, paddle.to_tensor(back, place=place)
