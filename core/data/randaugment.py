"""RandAugment (arXiv 1909.13719) with timm's operations, whose effects grow with the magnitude.

``draw`` draws all that is random. ``apply`` is deterministic, and gives the pixels of timm's
operations on Pillow images.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from numpy.random import Generator
from PIL import Image, ImageFilter, ImageOps

from triptych.core.config import spec
from triptych.core.data import pixels

HIGHEST = 10.0
"""The magnitude of the largest effect."""

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
Matrix = tuple[float, float, float, float, float, float]
Fill = tuple[int, ...]


class Draw(NamedTuple):
    """One operation with its random numbers.

    Attributes:
        name: a name in ``OPERATIONS``.
        magnitude: from 0 to ``HIGHEST``.
        negative: the direction, where the operation has one.
        interpolation: where the operation moves pixels.
    """

    name: str
    magnitude: float
    negative: bool
    interpolation: Literal["bilinear", "bicubic"]


def draw(op: spec.RandAugment, generator: Generator) -> list[Draw]:
    """The operations of one view, in order, without those that are skipped."""
    names = list(OPERATIONS)
    return [_drawn(op, generator, names[number]) for number in _chosen(op, generator)]


def _chosen(op: spec.RandAugment, generator: Generator) -> list[int]:
    """Numbers of the operations that are applied; the same one may come twice."""
    numbers = generator.integers(len(OPERATIONS), size=op.operations)
    applied = generator.random(op.operations) < op.p
    return [int(number) for number in numbers[applied]]


def _drawn(op: spec.RandAugment, generator: Generator, name: str) -> Draw:
    magnitude = min(max(generator.normal(op.magnitude, op.deviation), 0.0), HIGHEST)
    negative = generator.random() < 0.5
    interpolation = op.interpolation
    if interpolation == "random":
        interpolation = "bicubic" if generator.random() < 0.5 else "bilinear"
    return Draw(name, magnitude, negative, interpolation)


def apply(image: Image.Image, draw: Draw, op: spec.RandAugment) -> Image.Image:
    """The image after one operation.

    Args:
        op: gives the colour outside the image and the widest shift.
    """
    operation = OPERATIONS[draw.name]
    value = operation.level(draw.magnitude / HIGHEST, -1 if draw.negative else 1)
    if isinstance(operation, Colour):
        return operation.change(image, value)
    if isinstance(operation, Rotation):
        return _moved(image, op.fill, partial(_rotated, angle=value, kind=draw.interpolation))
    value *= op.translate if isinstance(operation, Shift) else 1.0
    matrix = operation.matrix(value, image)
    return _moved(image, op.fill, partial(_transformed, matrix=matrix, kind=draw.interpolation))


# ---------------------------------------------------------------------------------------- geometry


def _rotated(image: Image.Image, fill: Fill, angle: float, kind: str) -> Image.Image:
    return image.rotate(angle, _RESAMPLING[kind], fillcolor=_color(fill))


def _transformed(image: Image.Image, fill: Fill, matrix: Matrix, kind: str) -> Image.Image:
    how = Image.Transform.AFFINE
    return image.transform(image.size, how, matrix, _RESAMPLING[kind], fillcolor=_color(fill))


def _color(fill: Fill) -> tuple[int, ...] | int:
    return fill if len(fill) > 1 else fill[0]


def _moved(
    image: Image.Image, fill: Fill, move: Callable[[Image.Image, Fill], Image.Image]
) -> Image.Image:
    """Moves all bands; alpha alone, as in ``pixels``."""
    bands = len(image.getbands())
    fill = fill * bands if len(fill) == 1 else _fitting(fill, bands)
    if image.mode not in ("LA", "RGBA"):
        return move(image, fill)
    pairs = zip(image.split(), fill, strict=True)
    return Image.merge(image.mode, [move(band, (value,)) for band, value in pairs])


def _fitting(fill: Fill, bands: int) -> Fill:
    """The colour for an image of so many bands: the luminance if it was made grey before."""
    if len(fill) == bands:
        return fill
    grey = Image.new("RGB", (1, 1), fill[:3]).convert("L").tobytes()[0]
    return (grey, *fill[3:])[:bands]


def _shear_x(value: float, image: Image.Image) -> Matrix:
    return 1, value, 0, 0, 1, 0


def _shear_y(value: float, image: Image.Image) -> Matrix:
    return 1, 0, 0, value, 1, 0


def _translate_x(value: float, image: Image.Image) -> Matrix:
    return 1, 0, value * image.width, 0, 1, 0


def _translate_y(value: float, image: Image.Image) -> Matrix:
    return 1, 0, 0, 0, 1, value * image.height


# ------------------------------------------------------------------------------------------ colour


@pixels.leave_alpha
def _autocontrast(image: Image.Image, value: float) -> Image.Image:
    return ImageOps.autocontrast(image)


@pixels.leave_alpha
def _equalize(image: Image.Image, value: float) -> Image.Image:
    return ImageOps.equalize(image)


@pixels.leave_alpha
def _invert(image: Image.Image, value: float) -> Image.Image:
    return ImageOps.invert(image)


@pixels.leave_alpha
def _posterize(image: Image.Image, value: float) -> Image.Image:
    """Keeps the ``value`` highest bits."""
    return ImageOps.posterize(image, int(value))


def _solarize(image: Image.Image, value: float) -> Image.Image:
    return pixels.solarize(image, int(value))


@pixels.leave_alpha
def _solarize_add(image: Image.Image, value: float) -> Image.Image:
    """Brightens the darker half of the values by ``value``."""
    table = [min(255, old + int(value)) if old < 128 else old for old in range(256)]
    return image.point(table * len(image.getbands()))


@pixels.leave_alpha
def _sharpness(image: Image.Image, value: float) -> Image.Image:
    """Blend with the smoothed image: 0 is smooth, 1 the image."""
    return Image.blend(image.filter(ImageFilter.SMOOTH), image, value)


# ---------------------------------------------------------------------------------------- levels
# A level function takes the magnitude from 0 to 1 and the sign, -1 or 1.

Level = Callable[[float, int], float]


def _up_to(highest: float) -> Level:
    return lambda magnitude, sign: sign * magnitude * highest


def _none(magnitude: float, sign: int) -> float:
    return 0.0


def _factor(magnitude: float, sign: int) -> float:
    return max(0.1, 1.0 + sign * (magnitude * 0.9))


def _bits(magnitude: float, sign: int) -> float:
    return 4 - int(magnitude * 4)


def _threshold(magnitude: float, sign: int) -> float:
    return 256 - int(magnitude * 256)


def _addition(magnitude: float, sign: int) -> float:
    return int(magnitude * 110)


class Colour(NamedTuple):
    """An operation on the values of each pixel or its neighbours."""

    level: Level
    change: Callable[[Image.Image, float], Image.Image]


class Rotation(NamedTuple):
    """A rotation about the centre; the level is an angle, degrees anticlockwise."""

    level: Level


class Shear(NamedTuple):
    """A shear; ``matrix`` is that of the inverse, as Pillow takes it."""

    level: Level
    matrix: Callable[[float, Image.Image], Matrix]


class Shift(NamedTuple):
    """A shift; the level is a fraction of the widest one."""

    level: Level
    matrix: Callable[[float, Image.Image], Matrix]


OPERATIONS: dict[str, Colour | Rotation | Shear | Shift] = {
    "autocontrast": Colour(_none, _autocontrast),
    "equalize": Colour(_none, _equalize),
    "invert": Colour(_none, _invert),
    "rotate": Rotation(_up_to(30.0)),
    "posterize": Colour(_bits, _posterize),
    "solarize": Colour(_threshold, _solarize),
    "solarize_add": Colour(_addition, _solarize_add),
    "color": Colour(_factor, pixels.saturation),
    "contrast": Colour(_factor, pixels.contrast),
    "brightness": Colour(_factor, pixels.brightness),
    "sharpness": Colour(_factor, _sharpness),
    "shear_x": Shear(_up_to(0.3), _shear_x),
    "shear_y": Shear(_up_to(0.3), _shear_y),
    "translate_x": Shift(_up_to(1.0), _translate_x),
    "translate_y": Shift(_up_to(1.0), _translate_y),
}
"""All operations by name."""
