"""Deterministic operations on images: augmentations after their draws.

- Images are 8-bit Pillow images of mode L, LA, RGB or RGBA. No operation changes its argument.
- Sizes are (height, width) in pixels.
- Every operation gives the pixels of torchvision's operation of that name on Pillow images. On LA
  and RGBA, where torchvision multiplies by alpha, it gives those of each band alone.
- Geometry moves all bands. Colour operations leave alpha unchanged.
- On grey images saturation, hue and grayscale change nothing.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, Literal, ParamSpec

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

from triptych.core.data import compiled
from triptych.core.data.compiled import address
from triptych.core.data.pillow import crop
from triptych.core.data.resample import resized_part

Size = tuple[int, int]
Interpolation = Literal["bilinear", "bicubic"]
Rounding = Literal["torchvision", "paddlefleetx"]
P = ParamSpec("P")
Operation = Callable[Concatenate[Image.Image, P], Image.Image]

LONG = 16
"""Most pixels of a covering that is made as a whole, as a multiple of its middle's pixels."""

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


# --------------------------------------------------------------------------------------- geometry


def resize(image: Image.Image, size: Size, interpolation: Interpolation) -> Image.Image:
    """The whole image at another size. Pillow's filter smooths an image that gets smaller."""
    height, width = size
    filter_ = _FILTERS[interpolation]
    return by_band(image, lambda band: band.resize((width, height), filter_))


def crop_resize(
    image: Image.Image, box: tuple[int, int, int, int], size: Size, interpolation: Interpolation
) -> Image.Image:
    """A part of the image at another size.

    Args:
        box: top, left, height and width of the part, pixels.
    """
    top, left, height, width = box
    # Not resize(box=...): its filter would read pixels outside the box.
    part = crop(image, (left, top, left + width, top + height))
    return resize(part, size, interpolation)


def cover(
    image: Image.Image,
    size: Size,
    factor: float,
    interpolation: Interpolation,
    rounding: Rounding = "torchvision",
) -> Image.Image:
    """The image, resized with its proportions to just cover ``factor`` times ``size``."""
    return resize(image, cover_size(image, size, factor, rounding), interpolation)


def cover_size(
    image: Image.Image, size: Size, factor: float, rounding: Rounding = "torchvision"
) -> Size:
    """Size of an image that covers ``factor`` times ``size``, never smaller than ``size``.

    For a square size the shorter side becomes ``factor`` times the side, rounded. The longer side
    keeps the proportion. torchvision, timm and mmpretrain round it down, PaddleFleetX rounds it to
    the nearest pixel.
    """
    height, width = (max(side, round(side * factor)) for side in size)
    if rounding == "paddlefleetx":
        scale = max(height / image.height, width / image.width)
        return max(height, round(image.height * scale)), max(width, round(image.width * scale))
    if height * image.width >= width * image.height:
        width = max(width, int(height * image.width / image.height))
    else:
        height = max(height, int(width * image.height / image.width))
    return height, width


def center_crop(image: Image.Image, size: Size, rounding: Rounding = "torchvision") -> Image.Image:
    """The middle of an image. A smaller image gets a border of zeros.

    torchvision, timm and mmpretrain round half a pixel to even, PaddleFleetX rounds it down.
    """
    height, width = (max(pair) for pair in zip(size, (image.height, image.width), strict=True))
    if (height, width) != (image.height, image.width):
        left, top = (width - image.width) // 2, (height - image.height) // 2
        image = crop(image, (-left, -top, width - left, height - top))
    return crop(image, middle((height, width), size, rounding))


def center_cover(
    image: Image.Image,
    size: Size,
    factor: float,
    interpolation: Interpolation,
    rounding: Rounding = "torchvision",
) -> Image.Image:
    """``center_crop`` of ``cover``, pixel for pixel, but with bounded memory.

    For an image of 1 by 60 000 pixels ``cover`` would be 60 000 times as large as its middle.
    """
    whole = cover_size(image, size, factor, rounding)
    if not is_long(whole, size):
        return center_crop(resize(image, whole, interpolation), size, rounding)
    left, top, right, bottom = middle(whole, size, rounding)
    box = (top, left, bottom - top, right - left)
    return by_band(image, lambda band: resized_part(band, whole, box, interpolation))


def is_long(whole: Size, size: Size) -> bool:
    """Whether a covering has so many more pixels than its middle that it is not made as a whole."""
    return math.prod(whole) > LONG * math.prod(size)


def middle(whole: Size, size: Size, rounding: Rounding) -> tuple[int, int, int, int]:
    """The middle of ``whole`` as left, top, right, bottom."""
    height, width = size
    rest = whole[0] - height, whole[1] - width
    half = (lambda a: a // 2) if rounding == "paddlefleetx" else (lambda a: round(a / 2))
    top, left = map(half, rest)
    return left, top, left + width, top + height


def horizontal_flip(image: Image.Image) -> Image.Image:
    """Exchanges left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def affine(
    image: Image.Image, angle: float, shift: tuple[float, float], scale: float, shear: float
) -> Image.Image:
    """Shears, scales, rotates about the centre, then moves; bilinear, black outside.

    Args:
        angle: degrees, clockwise.
        shift: (x, y) in pixels, to the right and down.
        scale: magnification.
        shear: degrees; the lower half moves right.
    """
    matrix = inverse((image.height, image.width), angle, shift, scale, shear)
    kind, filter_ = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return by_band(image, lambda band: band.transform(image.size, kind, matrix, filter_))


def inverse(
    size: Size, angle: float, shift: tuple[float, float], scale: float, shear: float
) -> tuple[float, float, float, float, float, float]:
    """The inverse of ``affine``: the place in the image of each place in the result.

    Args:
        size: (height, width) of the image.

    Returns:
        a, b, c, d, e, f of (a x + b y + c, d x + e y + f), pixels from the upper left corner.
    """
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    lean = math.tan(math.radians(shear))
    a, b = (cosine + sine * lean) / scale, (sine - cosine * lean) / scale
    d, e = -sine / scale, cosine / scale
    x, y = size[1] / 2, size[0] / 2
    to_x, to_y = x + shift[0], y + shift[1]
    return a, b, x - a * to_x - b * to_y, d, e, y - d * to_x - e * to_y


def by_band(image: Image.Image, operation: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Applies an operation that mixes neighbouring pixels to each band alone.

    On LA and RGBA Pillow would multiply the other bands by the last one before the operation, and
    divide after it. That is right for transparency and wrong for a last band of another meaning.
    """
    if image.mode not in ("LA", "RGBA"):
        return operation(image)
    return Image.merge(image.mode, [operation(band) for band in image.split()])


# ----------------------------------------------------------------------------------------- colour


def leave_alpha(operation: Operation[P]) -> Operation[P]:
    """Applies an operation to the colour bands and puts alpha back."""

    @wraps(operation)
    def wrapped(image: Image.Image, /, *args: P.args, **kwargs: P.kwargs) -> Image.Image:
        if image.mode not in ("LA", "RGBA"):
            return operation(image, *args, **kwargs)
        result = operation(image.convert(image.mode[:-1]), *args, **kwargs)
        result.putalpha(image.getchannel("A"))
        return result

    return wrapped


@leave_alpha
def brightness(image: Image.Image, factor: float) -> Image.Image:
    """Blend with black: 0 is black, 1 the image."""
    return Image.blend(Image.new(image.mode, image.size), image, factor)


@leave_alpha
def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the mean luminance, rounded: 0 is plain grey, 1 the image."""
    counts = np.array(image.convert("L").histogram())
    mean = int(counts @ np.arange(256) / counts.sum() + 0.5)
    plain = Image.new(image.mode, image.size, (mean,) * len(image.getbands()))
    return Image.blend(plain, image, factor)


@leave_alpha
def saturation(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the luminance of each pixel: 0 is grey, 1 the image."""
    if image.mode == "L":
        return image
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


@leave_alpha
def hue(image: Image.Image, shift: float) -> Image.Image:
    """Turns the colour circle by ``shift`` turns, in steps of 1/255 that are cut towards zero."""
    if image.mode == "L":
        return image
    turn = Image.new("HSV", image.size, (int(shift * 255) % 256, 0, 0))
    return ImageChops.add_modulo(image.convert("HSV"), turn).convert("RGB")


@leave_alpha
def grayscale(image: Image.Image) -> Image.Image:
    """The luminance (ITU-R 601) alone: mode L, or LA for an image with alpha.

    Keep one band: blurring it is three times faster, and ``write_planes`` copies it to all colour
    planes.
    """
    return image.convert("L")


@leave_alpha
def gaussian_blur(image: Image.Image, radius: float) -> Image.Image:
    """Pillow's Gaussian blur (three box blurs) of standard deviation ``radius``, pixels."""
    blur = ImageFilter.GaussianBlur(radius)
    # Band by band: Pillow stores RGB as four bytes and would blur the unused byte, too.
    return Image.merge(image.mode, [band.filter(blur) for band in image.split()])


@leave_alpha
def solarize(image: Image.Image, threshold: int) -> Image.Image:
    """Inverts the values that are not below ``threshold``."""
    table = [value if value < threshold else 255 - value for value in range(256)]
    return image.point(table * len(image.getbands()))


# ------------------------------------------------------------------------------------ to numbers


def write_planes(image: Image.Image, out: NDArray[np.uint8]) -> None:
    """Writes each band of an image to a plane. A grey image fills all colour planes.

    Args:
        out: (C, H, W), with H and W those of the image.
    """
    if image.mode == "LA" and len(out) == 4:
        image = image.convert("RGBA")
    array = np.asarray(image)
    out[...] = array if array.ndim == 2 else array.transpose(2, 0, 1)


def normalize(
    planes: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """(x / 255 - mean) / std in float32, each step rounded, as torchvision does.

    Args:
        planes: (..., C, H, W).
        mean: one value, or one per channel, of values in 0..1.
        std: one value, or one per channel.
    """
    channels = planes.shape[-3]
    out = np.empty(planes.shape, np.float32)
    means, stds = (np.broadcast_to(np.array(v, np.float32), channels) for v in (mean, std))
    source, target = (a.reshape(-1, channels, *planes.shape[-2:]) for a in (planes, out))
    fast = compiled.kernels(planes.size)
    # Plane by plane: a plane stays in the cache for its three passes.
    for image, result in zip(source, target, strict=True):
        for plane, value, center, spread in zip(image, result, means, stds, strict=True):
            if fast is not None and plane.flags.c_contiguous:
                fast.normalize(address(plane), plane.size, center, spread, address(value))
                continue
            np.divide(plane, np.float32(255), out=value, dtype=np.float32)
            np.subtract(value, center, out=value)
            np.divide(value, spread, out=value)
    return out
