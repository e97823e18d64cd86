"""The ``model`` section: encoders."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import model_validator

from triptych.core.config.fields import (
    Bool,
    Channels,
    KeyedError,
    PositiveFloat,
    PositiveInt,
    Section,
)

VIT_PRESETS: dict[str, dict[str, int]] = {
    "vit_tiny": {"width": 192, "depth": 12, "heads": 3},
    "vit_small": {"width": 384, "depth": 12, "heads": 12},  # MoCo v3 gives ViT-S 12 heads, not 6
    "vit_base": {"width": 768, "depth": 12, "heads": 12},
    "vit_large": {"width": 1024, "depth": 24, "heads": 16},
    "vit": {},
}


class VitSpec(Section):
    """A vision transformer with timm's names and shapes."""

    name: Literal["vit", "vit_tiny", "vit_small", "vit_base", "vit_large"]
    """A named size fills width, depth and heads; "vit" wants them given."""
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
    """Pixels: one number for a square, or [height, width]."""
    channels: Channels = 3
    patch_size: PositiveInt = 16
    width: PositiveInt
    """Width of the residual stream; divisible by heads and by 4 (position table)."""
    depth: PositiveInt
    heads: PositiveInt
    mlp_ratio: PositiveInt = 4
    stem: Literal["patch"] = "patch"
    freeze_patch_embed: Bool = True
    """Keep the random patch projection fixed (MoCo v3, section 4.1)."""
    layer_norm_eps: PositiveFloat = 1e-6

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        name = given.get("name") if isinstance(given, dict) else None
        return {**VIT_PRESETS.get(name, {}), **given} if isinstance(name, str) else given

    def contradictions(self) -> Iterator[KeyedError]:
        """Widths and sizes that do not divide."""
        if self.width % self.heads:
            yield KeyedError("heads", f"width {self.width} is not divisible by heads {self.heads}")
        if self.width % 4:
            yield KeyedError("width", f"width {self.width} is not divisible by 4 (position table)")
        for size in dict.fromkeys(self.size):
            if size % self.patch_size:
                yield KeyedError(
                    "image_size",
                    f"image size {size} is not divisible by patch_size {self.patch_size}",
                )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of an image, pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patch grid."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size
