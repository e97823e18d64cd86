"""Vision transformer with timm's names and shapes and the fixed position table of MoCo v3.

Shape letters: N images, L patches, T tokens, D width, H heads.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triptych.backends.torch.layers import BatchNorm
from triptych.core import parameters
from triptych.core.config.spec import VitSpec
from triptych.core.methods.transformer import Transformer


class VisionTransformer(Transformer, TimmVisionTransformer):
    """timm's network without its classifier. Parameters have timm's names and shapes.

    Position table and patch projection are trained only if the spec says so.
    """

    def __init__(self, spec: VitSpec) -> None:
        super().__init__(
            img_size=spec.size,
            patch_size=spec.patch_size,
            in_chans=spec.channels,
            num_classes=0,
            embed_dim=spec.width,
            depth=spec.depth,
            num_heads=spec.heads,
            mlp_ratio=_mlp_ratio(spec),
            norm_layer=partial(nn.LayerNorm, eps=spec.layer_norm_eps),
            global_pool="avg" if spec.fc_norm else "token",
            fc_norm=spec.fc_norm,
            weight_init="skip",  # the initial values come with the state
        )
        self.width, self.patch_count = spec.width, self.pos_embed.shape[1] - 1
        self.pos_embed.requires_grad_(not spec.freeze_positions)
        if spec.stem == "conv":
            self.patch_embed.proj = conv_stem(spec)
        else:
            self.patch_embed.requires_grad_(not spec.freeze_patch_embed)

    def embed(self, images: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        patches = self.patch_embed(images)
        # Not len(): an exported network takes any number of images.
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)
        return torch.cat([cls_token, patches], dim=1) + self.pos_embed

    def embed_some(self, images: Tensor, ids: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]
        patches = patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[-1]))
        token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        return torch.cat([token, patches], dim=1)

    def last_block(self, x: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        return class_token(self.blocks[-1], x)

    def attend(self, x: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        return class_attention(self.blocks[-1], x)

    def mean(self, x: Tensor) -> Tensor:
        """See ``core.methods.transformer.Transformer``."""
        return x[:, 1:].mean(1)

    def kept(self, layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """See ``core.methods.transformer.Transformer``."""
        if not (self.recompute and torch.is_grad_enabled()):
            return layer
        return partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)


def conv_stem(spec: VitSpec) -> nn.Sequential:
    """Convolutions that replace the patch projection. (N, C, H, W) -> (N, D, rows, columns)."""
    layers: list[nn.Module] = []
    for layer in parameters.conv_stem(spec):
        layers += [
            nn.Conv2d(layer.fan_in, layer.fan_out, layer.kernel, layer.stride, 1, bias=False),
            BatchNorm(layer.fan_out),
            nn.ReLU(True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(spec.width, spec.width, 1))


def blocks(spec: VitSpec) -> nn.Sequential:
    """The blocks of a ViT, without embedding and last norm. (N, T, D) -> (N, T, D)."""
    norm = partial(nn.LayerNorm, eps=spec.layer_norm_eps)
    size = {"num_heads": spec.heads, "mlp_ratio": _mlp_ratio(spec), "qkv_bias": True}
    return nn.Sequential(*[Block(spec.width, **size, norm_layer=norm) for _ in range(spec.depth)])


def _mlp_ratio(spec: VitSpec) -> float:
    """The ratio from which timm computes the hidden width of the MLPs.

    timm rounds the product down, which a quotient without the half may miss by a rounding error.
    """
    return (spec.mlp_width + 0.5) / spec.width


def class_token(block: Block, x: Tensor) -> Tensor:
    """The class token after a block. (N, T, D) -> (N, D).

    The loss needs only this row of the last block's output, so only this row is computed. Keys and
    values come from all tokens.
    """
    n, length, _ = x.shape
    attention = block.attn
    normal = block.norm1(x)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    third = len(weight) // 3  # a process may have some of the heads only
    query = F.linear(normal[:, 0], weight[:third], bias[:third])
    key_value = F.linear(normal, weight[third:], bias[third:])
    key, value = key_value.reshape(n, length, 2, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query = query.reshape(n, attention.num_heads, 1, -1)
    mixed = F.scaled_dot_product_attention(query, key, value).reshape(n, third)
    x = x[:, 0] + attention.proj(mixed)
    return x + block.mlp(block.norm2(x))


def class_attention(block: Block, x: Tensor) -> Tensor:
    """How strongly the class token attends to each token in a block. (N, T, D) -> (N, H, T)."""
    n, length, _ = x.shape
    attention = block.attn
    qkv = attention.qkv(block.norm1(x)).reshape(n, length, 3, attention.num_heads, -1)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)
    scores = query[:, :, :1] * attention.scale @ key.mT
    return scores.softmax(-1)[:, :, 0]
