"""The ``model`` section: encoders."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from triptych.core.config.fields import (
    Bool,
    Channels,
    Depth,
    KeyedError,
    Pixels,
    PositiveFloat,
    PositiveInt,
    Ratio,
    Section,
    Width,
)

WHOLE = 1e-6
"""Distance from a whole number that counts as a rounding error."""

VIT_PRESETS: dict[str, dict[str, int | str]] = {
    "vit_tiny": {"width": 192, "depth": 12, "heads": 3},
    "vit_small": {"width": 384, "depth": 12, "heads": 12},  # ViT-S of MoCo v3 has 12 heads, not 6
    "vit_base": {"width": 768, "depth": 12, "heads": 12},
    "vit_large": {"width": 1024, "depth": 24, "heads": 16},
    # The convolutional stem replaces one block (MoCo v3, section 5).
    "vit_conv_small": {"width": 384, "depth": 11, "heads": 12, "stem": "conv"},
    "vit_conv_base": {"width": 768, "depth": 11, "heads": 12, "stem": "conv"},
    "vit": {},
}

RESNET_PRESETS: dict[str, dict[str, str | tuple[int, ...]]] = {
    "resnet18": {"block": "basic", "depths": (2, 2, 2, 2)},
    "resnet34": {"block": "basic", "depths": (3, 4, 6, 3)},
    "resnet50": {"block": "bottleneck", "depths": (3, 4, 6, 3)},
    "resnet101": {"block": "bottleneck", "depths": (3, 4, 23, 3)},
    "resnet152": {"block": "bottleneck", "depths": (3, 8, 36, 3)},
    "resnet": {},
}

PRESETS: dict[str, dict[str, Any]] = {**VIT_PRESETS, **RESNET_PRESETS}


class EncoderSpec(Section):
    """The keys that all encoders share."""

    image_size: Pixels | tuple[Pixels, Pixels] = 224
    """Size in pixels: one number for a square, or [height, width]."""
    channels: Channels = 3

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, section: Any) -> Any:
        name = section.get("name") if isinstance(section, dict) else None
        return {**PRESETS.get(name, {}), **section} if isinstance(name, str) else section

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of an image in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size


class VitSpec(EncoderSpec):
    """A vision transformer with timm's names and shapes."""

    name: Literal[
        "vit",
        "vit_tiny",
        "vit_small",
        "vit_base",
        "vit_large",
        "vit_conv_small",
        "vit_conv_base",
    ]
    """A named size sets width, depth, heads and stem. With "vit", the spec must give the first
    three."""
    patch_size: PositiveInt = 16
    width: Width
    """Width of the tokens. It must be divisible by heads and by 4 (position table)."""
    depth: Depth
    heads: PositiveInt
    mlp_ratio: Ratio = 4.0
    """Hidden width of the MLPs, relative to width. The product must be whole."""
    stem: Literal["patch", "conv"] = "patch"
    """patch: one projection of each patch. conv: four 3x3 convolutions of stride 2, each with
    batch norm and ReLU, then a 1x1 convolution (arXiv 2106.14881)."""
    freeze_patch_embed: Bool = True
    """Whether the random patch projection stays fixed (MoCo v3, section 4.1). A conv stem is always
    trained."""
    freeze_positions: Bool = True
    """Whether the position table stays fixed."""
    fc_norm: Bool = False
    """Whether the last norm comes after the mean over the patch tokens instead of before (name of
    the norm: fc_norm). Only for fine-tuning with method.pooling mean."""
    layer_norm_eps: PositiveFloat = 1e-6
    init: Literal["moco_v3", "moca"] = "moco_v3"
    """Initial values. moco_v3: query, key and value are separate matrices, the class token is
    N(0, 1e-6), the patch bias is 0, and positions are row first. moca: query, key and value are one
    matrix, the class token is N(0, 0.02), the patch bias is that of PyTorch's convolutions, and
    positions are column first."""

    def contradictions(self) -> Iterator[KeyedError]:
        """Reports widths and sizes that do not divide."""
        if self.width % self.heads:
            yield KeyedError("heads", f"width {self.width} is not divisible by heads {self.heads}")
        if self.width % 4:
            yield KeyedError("width", f"width {self.width} is not divisible by 4 (position table)")
        hidden = self.width * self.mlp_ratio
        if self.mlp_width < 1 or abs(hidden - self.mlp_width) > WHOLE:
            yield KeyedError(
                "mlp_ratio",
                f"{self.mlp_ratio:g} times width {self.width} is {hidden:g}: expected a whole "
                "number of hidden units, 1 or more",
            )
        if self.stem == "conv" and self.width % 8:
            yield KeyedError("width", f"width {self.width} is not divisible by 8 (stem conv)")
        if self.stem == "conv" and self.patch_size != 16:
            yield KeyedError(
                "patch_size",
                f"stem conv halves an image four times: patch_size must be 16, is "
                f"{self.patch_size}",
            )
        for size in dict.fromkeys(self.size):
            if size % self.patch_size:
                yield KeyedError(
                    "image_size",
                    f"image size {size} is not divisible by patch_size {self.patch_size}",
                )

    @property
    def mlp_width(self) -> int:
        """Number of hidden units of the MLPs. A fraction is dropped, as in timm."""
        return math.floor(self.width * self.mlp_ratio + WHOLE)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patch grid."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    @property
    def features(self) -> int:
        """Width of the feature of an image: the class token."""
        return self.width


class ResnetSpec(EncoderSpec):
    """A residual network with torchvision's names and shapes (arXiv 1512.03385).

    In a bottleneck, the 3x3 convolution has the stride ("version 1.5").
    """

    name: Literal["resnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    """A named size sets block and depths. With "resnet", the spec must give both."""
    block: Literal["basic", "bottleneck"]
    """Convolutions of a block. basic: two 3x3. bottleneck: 1x1, 3x3 and 1x1; the last one has four
    times the channels of the other two."""
    depths: tuple[Depth, Depth, Depth, Depth]
    """Number of blocks in each of the four stages."""
    width: Width = 64
    """Channels of the first stage. Each later stage has twice as many as the one before."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """imagenet: 7x7 convolution of stride 2, then 3x3 max-pooling of stride 2. small: one 3x3
    convolution of stride 1, for images of a few dozen pixels."""
    zero_init_residual: Bool = False
    """Whether the gain of each block's last norm starts at 0, so that the residual branch of every
    block is 0 at first."""
    init: Literal["fan_out", "fan_in"] = "fan_out"
    """The fan in the initial values of convolutions, N(0, sqrt(2 / fan)). fan_out: as in PyTorch.
    fan_in: as in Paddle."""

    def contradictions(self) -> Iterator[KeyedError]:
        """Reports a named size with the blocks of another one."""
        preset = RESNET_PRESETS[self.name]
        if preset and preset != {"block": self.block, "depths": self.depths}:
            depths = "-".join(map(str, self.depths))
            yield KeyedError(
                "name",
                f"{self.name} has other blocks than {self.block} {depths}; leave out block and "
                "depths, or set name to resnet",
            )

    @property
    def bottleneck(self) -> bool:
        """Whether a block has three convolutions instead of two."""
        return self.block == "bottleneck"

    @property
    def expansion(self) -> int:
        """Output channels of a block, relative to the channels inside it."""
        return 4 if self.bottleneck else 1

    @property
    def features(self) -> int:
        """Width of the feature of an image: the last stage's channels, averaged over positions."""
        return self.width * 8 * self.expansion


ModelSpec = Annotated[VitSpec | ResnetSpec, Field(discriminator="name")]
