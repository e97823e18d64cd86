"""Vision transformer: timm's, with the fixed position table of MoCo v3.

Shape letters: N images, L patches, D width.
"""

from collections.abc import Sequence
from functools import partial

from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from triptych.core.config.spec import VitSpec


class VisionTransformer(TimmVisionTransformer):
    """timm's module without its classifier; parameters keep timm's names and shapes.

    The position table is never trained, the patch projection only where the spec says so.
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
            mlp_ratio=spec.mlp_ratio,
            norm_layer=partial(nn.LayerNorm, eps=spec.layer_norm_eps),
            weight_init="skip",  # the initial values come with the state
        )
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
        x = self._pos_embed(self.patch_embed(images))
        kept: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in layers:
                kept[f"layer{i}"] = x
        return {"final": self.norm(x), **kept}

    def forward(self, images: Tensor) -> Tensor:
        """The class token after the last norm. (N, C, H, W) -> (N, D)."""
        x = self._pos_embed(self.patch_embed(images))
        for block in self.blocks:
            x = block(x)
        # The norm works row by row: only the row that is used.
        return self.norm(x[:, 0])
