"""Vision transformer with timm's names and shapes and the fixed position table of MoCo v3.

Shape letters: N images, L patches, T tokens, D width, H heads.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triptych.backends.torch.layers import BatchNorm
from triptych.backends.torch.pipeline import Stage
from triptych.core import parameters
from triptych.core.config.spec import VitSpec
from triptych.core.methods.networks import run, walk


class VisionTransformer(TimmVisionTransformer):
    """timm's network without its classifier. Parameters have timm's names and shapes.

    Position table and patch projection are trained only if the spec says so.

    Attributes:
        recompute: whether the backward pass computes the activations of each block again.
        stage: which blocks this process has, if it is a stage of a pipeline.
    """

    recompute = False
    stage: Stage | None = None

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
        self.patch_count = self.pos_embed.shape[1] - 1
        self.pos_embed.requires_grad_(not spec.freeze_positions)
        if spec.stem == "conv":
            self.patch_embed.proj = conv_stem(spec)
        else:
            self.patch_embed.requires_grad_(not spec.freeze_patch_embed)

    def tokens(self, images: Tensor, layers: Sequence[int] = ()) -> dict[str, Tensor]:
        """See ``core.contracts.Encoder``."""
        x, outputs = self._walk(images, self._layers(), layers)
        return {"final": self.norm(x), **{f"layer{i}": y for i, y in outputs.items()}}

    def pooled(
        self, images: Tensor, pooling: str, scales: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> Tensor:
        """See ``core.contracts.Encoder``."""
        if pooling == "cls" and not scales:
            return self(images)
        x, _ = self._walk(images, self._layers(scales))
        x = self.norm(x)
        return self.fc_norm(x[:, 0] if pooling == "cls" else x[:, 1:].mean(1))

    def masked(self, images: Tensor, ids: Tensor, early: int) -> tuple[Tensor, Tensor]:
        """See ``core.contracts.MaskedEncoder``."""
        early_block = len(self.blocks) - 1 - early
        x, outputs = self._walk(images, self._layers(), (early_block,), ids)
        final = self.norm(x)
        return outputs[early_block] if early else final, final

    def class_attention(self, images: Tensor) -> Tensor:
        """See ``core.contracts.MaskedEncoder``."""
        *blocks, last = self.blocks
        x, _ = run(self._embed(images), blocks)
        return class_attention(last, x)

    def forward(self, images: Tensor) -> Tensor:
        """The class token after the last norm. (N, C, H, W) -> (N, D)."""
        last = self._kept(partial(class_token, self.blocks[-1]))
        x, _ = self._walk(images, [*self._layers()[:-1], last])
        return self.norm(x if x.ndim == 2 else x[:, 0])

    def _walk(
        self,
        images: Tensor,
        layers: Sequence[Callable[[Tensor], Tensor]],
        keep: Collection[int] = (),
        ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Embeds the patches, or those of the indices ``ids``, and applies the layers."""
        embed = partial(self._embed, images) if ids is None else partial(self._some, images, ids)
        if self.stage is None:
            return run(embed(), layers, keep)
        length = self.patch_count if ids is None else ids.shape[1]
        like = images.new_empty(()).expand(len(images), 1 + length, self.embed_dim)
        return self.stage.walk(embed, like, layers, keep)

    def _layers(
        self, scales: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> list[Callable[[Tensor], Tensor]]:
        """The blocks as functions of the tokens."""
        return [self._kept(block) for block in walk(self.blocks, scales)]

    def _kept(self, layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The layer, which keeps its activations or computes them again in the backward pass."""
        if not (self.recompute and torch.is_grad_enabled()):
            return layer
        return partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)

    def _some(self, images: Tensor, ids: Tensor) -> Tensor:
        """The class token and the patches ``ids`` (N, T), with their positions. (N, 1+T, D)."""
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]
        patches = patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[-1]))
        token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        return torch.cat([token, patches], dim=1)

    def _embed(self, images: Tensor) -> Tensor:
        """The class token and the patches, with their positions. (N, C, H, W) -> (N, 1+L, D)."""
        patches = self.patch_embed(images)
        # Not len(): an exported network takes any number of images.
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)
        return torch.cat([cls_token, patches], dim=1) + self.pos_embed


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
