"""The ``augment`` section: the operations of each view."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from triptych.core.config.fields import (
    Bool,
    Byte,
    CountInterval,
    Float,
    FractionInterval,
    Int,
    KeyedError,
    NonNegativeFloat,
    NonNegativeInterval,
    PositiveFloat,
    PositiveInt,
    PositiveInterval,
    Probability,
    Ratio,
    Section,
    Str,
)


class AugmentOp(Section):
    """One operation of a view. Operations are drawn and applied in the listed order."""

    op: Str
    p: Probability = 1.0
    """Probability that the operation is applied."""


class RandomResizedCrop(AugmentOp):
    """A random part of the image, resized to the model's image size."""

    op: Literal["random_resized_crop"]
    scale: FractionInterval = (0.08, 1.0)
    """Area of the crop as a fraction of the image."""
    ratio: PositiveInterval = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, width / height."""
    sampler: Literal["inception", "fitted"] = "inception"
    """inception: draws crops until one fits into the image (torchvision). fitted: draws the ratio,
    then the area among those that fit with this ratio (PaddleFleetX)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class RandomAffine(AugmentOp):
    """A small rotation, shift, scaling and shear about the centre."""

    op: Literal["random_affine"]
    degrees: NonNegativeFloat = 0.0
    """Rotation drawn from (-degrees, degrees)."""
    translate: Probability = 0.0
    """Shift in each direction, drawn from (-translate, translate) times the image size."""
    scale: PositiveInterval = (1.0, 1.0)
    shear: Annotated[Float, Field(ge=0, lt=90)] = 0.0
    """Horizontal shear drawn from (-shear, shear), degrees."""


class ColorJitter(AugmentOp):
    """Changes brightness, contrast, saturation and hue in a random order."""

    op: Literal["color_jitter"]
    brightness: NonNegativeFloat = 0.0
    contrast: NonNegativeFloat = 0.0
    saturation: NonNegativeFloat = 0.0
    hue: Annotated[Float, Field(ge=0, le=0.5)] = 0.0
    """Shift drawn from (-hue, hue), in turns of the colour circle."""


class Grayscale(AugmentOp):
    """Puts the luminance into all colour channels."""

    op: Literal["grayscale"]


class GaussianBlur(AugmentOp):
    """The Gaussian blur of Pillow."""

    op: Literal["gaussian_blur"]
    sigma: NonNegativeInterval = (0.1, 2.0)
    """Blur radius of Pillow, in pixels."""


class Solarize(AugmentOp):
    """Inverts bright values."""

    op: Literal["solarize"]
    threshold: Annotated[Int, Field(ge=0, le=256)] = 128
    """Smallest value that is inverted."""


class RandAugment(AugmentOp):
    """RandAugment (arXiv 1909.13719): random ones of 15 operations, as in timm.

    The defaults are timm's ``rand-m9-mstd0.5-inc1``, where all effects grow with the magnitude.
    mmpretrain's policy ``timm_increasing`` is the same with interpolation bicubic; the pixels are
    timm's, while mmpretrain itself moves pixels with OpenCV.
    """

    op: Literal["rand_augment"]
    operations: PositiveInt = 2
    """Number of operations for each view, drawn with replacement."""
    p: Probability = 0.5
    """Probability that each of them is applied."""
    magnitude: Annotated[Float, Field(ge=0, le=10)] = 9.0
    """Mean strength of the operations."""
    deviation: NonNegativeFloat = 0.5
    """Standard deviation of the strength. It is cut to 0 ... 10."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "random"
    """For rotations, shears and shifts. random: one of both for each operation."""
    fill: Annotated[tuple[Byte, ...], Field(min_length=1)] = (124, 116, 104)
    """Colour outside the image; one number holds for all channels."""
    translate: Probability = 0.45
    """Widest shift, as a fraction of the image size."""


class HorizontalFlip(AugmentOp):
    """Mirrors the image left to right."""

    op: Literal["horizontal_flip"]


class RandomErase(AugmentOp):
    """Random erasing (arXiv 1708.04896): boxes of the finished view get noise.

    It is the last operation. The defaults are timm's; mmpretrain's differ in ``values`` and
    ``fit``.
    """

    op: Literal["random_erase"]
    p: Probability = 0.25
    mode: Literal["pixel", "rand", "const"] = "pixel"
    """What a box gets. pixel: each pixel a random colour of its own. rand: one random colour.
    const: the mean of the data. Colours are drawn from a normal distribution."""
    values: Literal["normalized", "pixels"] = "normalized"
    """normalized: erases after the normalisation (timm). pixels: erases before it, with the mean
    and deviation of the data, cut to whole values from 0 to 255 (mmpretrain)."""
    area: FractionInterval = (0.02, 1 / 3)
    """Area of all boxes together, as a fraction of the image."""
    ratio: PositiveInterval = (0.3, 1 / 0.3)
    """Height / width of a box."""
    count: CountInterval = (1, 1)
    """Smallest and largest number of boxes."""
    fit: Literal["retry", "cut"] = "retry"
    """For boxes larger than the image. retry: draws again, ten times in all (timm). cut: they are
    cut to the image (mmpretrain)."""


Op = Annotated[
    RandomResizedCrop
    | RandomAffine
    | ColorJitter
    | Grayscale
    | GaussianBlur
    | Solarize
    | RandAugment
    | RandomErase
    | HorizontalFlip,
    Field(discriminator="op"),
]


class AugmentSpec(Section):
    """The views of each image, and their normalisation."""

    view1: tuple[Op, ...] = ()
    """The only view where the method learns from labels."""
    view2: tuple[Op, ...] = ()
    mean: tuple[Float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, for values from 0 to 1; one number holds for all channels."""
    std: tuple[PositiveFloat, ...] = (0.229, 0.224, 0.225)
    engine: Literal["pillow", "opencv"] = "pillow"
    """What computes the views from their draws. pillow: the bytes of torchvision's operations on
    Pillow images, by compiled loops where the extra ``fast`` is installed. opencv: the same
    operations by OpenCV (extra ``opencv``) in less time, with other pixels: a crop that gets
    smaller is not smoothed. Evaluation always uses Pillow."""
    on_device: Bool = False
    """Whether the device that trains makes the changes of colour and the blur, once it has the
    bytes of the crops. No byte of a view differs. Workers have less to do, the device more."""
    repeats: PositiveInt = 1
    """Number of copies of each image, with draws of their own, that follow each other in an epoch
    (repeated augmentation, arXiv 1901.09335). The epoch keeps its length, so it has that many times
    fewer images. DeiT: 3."""
    eval_resize: Ratio | None = 256 / 224
    """For evaluation, the shorter side is resized to this multiple of the image size. Then the
    centre is cropped. null: the centre is cropped without a resize, and a smaller image gets a
    black border."""
    eval_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation of this resize."""
    eval_rounding: Literal["torchvision", "paddlefleetx"] = "torchvision"
    """torchvision: the longer side is rounded down, and the place of the crop to the nearest even
    pixel (so do timm and mmpretrain). paddlefleetx: the longer side is rounded
    to the nearest pixel, and the place of the crop down."""

    def contradictions(self) -> Iterator[KeyedError]:
        """Reports an erasure that other operations would follow, and what no device does."""
        erases = any(isinstance(op, RandomErase) for op in (*self.view1, *self.view2))
        if self.on_device and (erases or self.engine != "pillow"):
            what = "random_erase" if erases else f"engine: {self.engine}"
            yield KeyedError("on_device", f"true: a device has no {what}; set it to false")
        for view, ops in (("view1", self.view1), ("view2", self.view2)):
            for number, op in enumerate(ops[:-1]):
                if isinstance(op, RandomErase):
                    yield KeyedError(
                        f"{view}.{number}.op", "random_erase acts on the finished view; put it last"
                    )


def augment_contradictions(
    augment: AugmentSpec, channels: int, views: int, batch_size: int, *, mixes: bool
) -> Iterator[KeyedError]:
    """The contradictions between augmentation and the rest of the spec.

    Args:
        channels: of the images.
        views: number of views that the method needs.
        batch_size: images per step.
        mixes: whether the method mixes images.
    """
    if mixes and augment.on_device:
        yield KeyedError(
            "augment.on_device", "true: the host mixes finished images; set it to false"
        )
    if views == 1 and augment.view2:
        yield KeyedError("augment.view2", "the method has one view, augment.view1; remove view2")
    if augment.repeats > batch_size:
        yield KeyedError(
            "augment.repeats",
            f"{augment.repeats} copies of an image are more than train.batch_size {batch_size}",
        )
    counts = {"mean": len(augment.mean), "std": len(augment.std)}
    for view in ("view1", "view2"):
        for number, op in enumerate(getattr(augment, view)):
            if isinstance(op, RandAugment):
                counts[f"{view}.{number}.fill"] = len(op.fill)
    for name, count in counts.items():
        if count not in (1, channels):
            yield KeyedError(
                f"augment.{name}",
                f"{count} values for {channels} channels: give one, or one each",
            )
