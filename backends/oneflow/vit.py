"""Vision transformer with timm's names and shapes and the fixed position table of MoCo v3.

Shape letters: N images, L patches, T tokens, D width, H heads.
"""

from collections.abc import Sequence

import oneflow as flow
import oneflow.nn.functional as F
from oneflow import Tensor, nn

from triptych.backends.oneflow.layers import Gelu, LayerNorm, Linear, PatchEmbed
from triptych.core.config.spec import VitSpec


class Attention(nn.Module):
    """Self-attention. (N, T, D) -> (N, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Every token attends to every token."""
        n, t, d = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = flow.unbind(qkv, dim=0)
        weights = F.softmax(flow.matmul(query * self.scale, key, transpose_b=True), dim=-1)
        return self.proj(flow.matmul(weights, value).transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    """Two linear layers with GELU between them. (N, T, D) -> (N, T, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.act = Gelu()
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Each token on its own."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. (N, T, D) -> (N, T, D)."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.norm1 = LayerNorm(spec.width, spec.layer_norm_eps)
        self.attn = Attention(spec.width, spec.heads)
        self.norm2 = LayerNorm(spec.width, spec.layer_norm_eps)
        self.mlp = Mlp(spec.width, spec.width * spec.mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then the MLP, each added to its input."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """The twin of timm's module without its classifier; parameters have timm's names and shapes.

    The position table is never trained, the patch projection only where the spec says so.
    """

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        rows, columns = spec.grid
        self.patch_embed = PatchEmbed(spec.channels, spec.width, spec.patch_size)
        self.cls_token = nn.Parameter(flow.zeros(1, 1, spec.width))
        self.pos_embed = nn.Parameter(flow.zeros(1, 1 + rows * columns, spec.width))
        self.blocks = nn.Sequential(*[Block(spec) for _ in range(spec.depth)])
        self.norm = LayerNorm(spec.width, spec.layer_norm_eps)
        self.pos_embed.requires_grad_(False)
        self.patch_embed.requires_grad_(not spec.freeze_patch_embed)

    def tokens(self, images: Tensor, layers: Sequence[int] = ()) -> dict[str, Tensor]:
        """All tokens after the last norm, and the raw output of chosen blocks.

        Args:
            images: (N, C, H, W).
            layers: 0-based block indices.

        Returns:
            "final" and "layer<i>", each (N, 1+L, D).
        """
        x = self._embed(images)
        kept: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in layers:
                kept[f"layer{i}"] = x
        return {"final": self.norm(x), **kept}

    def forward(self, images: Tensor) -> Tensor:
        """The class token after the last norm. (N, C, H, W) -> (N, D)."""
        x = self._embed(images)
        for block in self.blocks:
            x = block(x)
        # The norm works row by row: only the row that is used.
        return self.norm(x[:, 0])

    def _embed(self, images: Tensor) -> Tensor:
        """Patches behind the class token, with their positions. (N, C, H, W) -> (N, 1+L, D)."""
        patches = self.patch_embed(images)
        cls_token = self.cls_token.expand(len(patches), -1, -1)
        return flow.cat([cls_token, patches], dim=1) + self.pos_embed
