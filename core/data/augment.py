"""Random augmentation: draws the changes that make a view.

``draw`` draws all that is random about a view from a generator, the size of the image and the
recipe. The changes that it returns are deterministic. The draws follow the order of the recipe:
for each operation first whether it is applied, then its parameters.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

from numpy.random import Generator
from PIL import Image

from triptych.core.config import spec
from triptych.core.data import pixels, randaugment
from triptych.core.data.pixels import Size

Change = Callable[[Image.Image], Image.Image]
Box = tuple[int, int, int, int]


def operation(change: Change) -> Callable[..., Image.Image]:
    """The function of ``pixels`` that a change applies."""
    return getattr(change, "func", change)


def arguments(change: Change) -> dict[str, Any]:
    """The arguments that a change gives to its operation."""
    return getattr(change, "keywords", {})


def view(
    image: Image.Image, ops: Sequence[spec.Op], generator: Generator, size: Size
) -> Image.Image:
    """One random view of an image.

    Args:
        ops: the recipe.
        size: (height, width) of the view, pixels.

    Returns:
        The view in the mode of the image, or without colour (L for RGB, LA for RGBA) if it was
        made grey: see ``pixels.grayscale``.
    """
    changes = draw(ops, generator, (image.height, image.width), size)
    return reduce(lambda result, change: change(result), changes, image)


def draw(
    ops: Sequence[spec.Op], generator: Generator, image_size: Size, size: Size
) -> list[Change]:
    """The changes of an image that make one view, in order.

    A recipe without a crop starts with a plain resize of the whole image to ``size``.
    """
    changes: list[Change] = []
    here = image_size
    # Types are compared, since isinstance takes microseconds for Pydantic's classes.
    if spec.RandomResizedCrop not in map(type, ops):
        changes.append(partial(pixels.resize, size=size, interpolation="bilinear"))
        here = size
    for op in ops:
        if type(op) is spec.RandomResizedCrop:
            changes.append(_crop(op, generator, here, size))
            here = size
        elif type(op) is spec.RandomErase:
            continue  # ``erasing`` erases parts of the finished view
        elif type(op) is spec.RandAugment:
            drawn = randaugment.draw(op, generator)
            changes += [partial(randaugment.apply, draw=each, op=op) for each in drawn]
        elif generator.random() < op.p:
            changes += _DRAWS[type(op)](op, generator, here)
    return changes


# ---------------------------------------------------------------------------------------- geometry


def _crop(op: spec.RandomResizedCrop, generator: Generator, here: Size, size: Size) -> Change:
    """A crop resized to ``size``. With probability 1 - p it is the whole image."""
    box = (0, 0, *here)
    if generator.random() < op.p:
        sampler = crop_box if op.sampler == "inception" else fitted_box
        box = sampler(generator, here, op.scale, op.ratio)
    return partial(pixels.crop_resize, box=box, size=size, interpolation=op.interpolation)


def crop_box(
    generator: Generator, here: Size, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A random part of an image, as Inception's training did it (arXiv 1409.4842, section 6).

    Args:
        here: (height, width) of the image.
        scale: range of the area as a fraction of the image's, drawn uniformly.
        ratio: range of width / height, drawn uniformly in its logarithm.

    Returns:
        top, left, height, width. After ten draws that do not fit, the largest part in the middle
        with proportions within ``ratio``.
    """
    height, width = here
    logs = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        proportion = math.exp(generator.uniform(*logs))
        w, h = round(math.sqrt(area * proportion)), round(math.sqrt(area / proportion))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.integers(height - h, endpoint=True))
            left = int(generator.integers(width - w, endpoint=True))
            return top, left, h, w
    return _middle(here, ratio)


def fitted_box(
    generator: Generator, here: Size, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A random part of an image, as PaddleFleetX draws it for MoCo: every draw fits.

    Args:
        here: (height, width) of the image.
        scale: as in ``crop_box``, bounded by the largest part that fits.
        ratio: range of width / height, drawn uniformly.

    Returns:
        top, left, height, width.
    """
    height, width = here
    proportion = generator.uniform(*ratio)
    largest = min(width / height / proportion, height / width * proportion)
    fraction = generator.uniform(min(scale[0], largest), min(scale[1], largest))
    # PaddleFleetX multiplies roots. Another order may lose a pixel of a part that fits exactly.
    root, stretch = math.sqrt(height * width * fraction), math.sqrt(proportion)
    # Rounding may make a part larger than the image.
    w = min(max(1, math.floor(root * stretch)), width)
    h = min(max(1, math.floor(root * (1 / stretch))), height)
    top = int(generator.integers(height - h, endpoint=True))
    left = int(generator.integers(width - w, endpoint=True))
    return top, left, h, w


def _middle(here: Size, ratio: tuple[float, float]) -> Box:
    height, width = here
    h, w = height, width
    if width < height * ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width > height * ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def _affine(op: spec.RandomAffine, generator: Generator, here: Size) -> list[Change]:
    height, width = here
    angle = generator.uniform(-op.degrees, op.degrees)
    across, down = generator.uniform(-op.translate, op.translate, 2)
    scale = generator.uniform(*op.scale)
    shear = generator.uniform(-op.shear, op.shear)
    shift = (across * width, down * height)
    return [partial(pixels.affine, angle=angle, shift=shift, scale=scale, shear=shear)]


def _flip(op: spec.HorizontalFlip, generator: Generator, here: Size) -> list[Change]:
    return [pixels.horizontal_flip]


# ------------------------------------------------------------------------------------------ colour


def _jitter(op: spec.ColorJitter, generator: Generator, here: Size) -> list[Change]:
    """Four changes in random order; changes of strength zero are left out."""
    changes: list[Change] = []
    for which in generator.permutation(4):
        name = ("brightness", "contrast", "saturation", "hue")[which]
        strength = getattr(op, name)
        if not strength:
            continue
        if name == "hue":
            changes.append(partial(pixels.hue, shift=generator.uniform(-strength, strength)))
        else:
            factor = generator.uniform(max(0.0, 1 - strength), 1 + strength)
            changes.append(partial(getattr(pixels, name), factor=factor))
    return changes


def _grayscale(op: spec.Grayscale, generator: Generator, here: Size) -> list[Change]:
    return [pixels.grayscale]


def _blur(op: spec.GaussianBlur, generator: Generator, here: Size) -> list[Change]:
    return [partial(pixels.gaussian_blur, radius=generator.uniform(*op.sigma))]


def _solarize(op: spec.Solarize, generator: Generator, here: Size) -> list[Change]:
    return [partial(pixels.solarize, threshold=op.threshold)]


_DRAWS: dict[type, Callable[[Any, Generator, Size], list[Change]]] = {
    spec.RandomAffine: _affine,
    spec.ColorJitter: _jitter,
    spec.Grayscale: _grayscale,
    spec.GaussianBlur: _blur,
    spec.Solarize: _solarize,
    spec.HorizontalFlip: _flip,
}
