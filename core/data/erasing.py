"""Random erasing (arXiv 1708.04896): boxes of a finished view get noise."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from triptych.core.config import spec
from triptych.core.data.pixels import Size, normalize

ATTEMPTS = 10
"""Draws until a box fits, before the box is left out."""


class Box(NamedTuple):
    """A part of an image, pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def place(self) -> tuple[slice, slice, slice]:
        """Its place in an image (C, H, W)."""
        rows, columns = slice(self.top, self.top + self.height), self.left + self.width
        return slice(None), rows, slice(self.left, columns)


def normalized(
    planes: NDArray[np.uint8],
    augment: spec.AugmentSpec,
    ops: Sequence[spec.Op],
    generators: Callable[[int], Generator],
) -> NDArray[np.float32]:
    """One view of each image, normalised, and erased if the recipe ends with an erasure.

    Args:
        planes: (N, C, H, W); erased in place by an erasure before the normalisation.
        ops: the recipe of the view.
        generators: the random generator of an image, by its row.

    Returns:
        (N, C, H, W).
    """
    if not needs_noise(ops):
        _erase_bytes(planes, augment, ops, generators)
        return normalize(planes, augment.mean, augment.std)
    views = normalize(planes, augment.mean, augment.std)
    for row, view in enumerate(views):
        for box, noise in drawn(cast(spec.RandomErase, ops[-1]), generators(row), view.shape):
            view[box.place] = noise
    return views


def needs_noise(ops: Sequence[spec.Op]) -> bool:
    """Whether a recipe ends with an erasure that writes noise into normalised pixels."""
    return bool(ops) and isinstance(ops[-1], spec.RandomErase) and ops[-1].values != "pixels"


def erased_bytes(
    planes: NDArray[np.uint8],
    augment: spec.AugmentSpec,
    ops: Sequence[spec.Op],
    generators: Callable[[int], Generator],
) -> NDArray[np.uint8]:
    """A copy of the bytes of each view, erased if the recipe ends with an erasure.

    The arguments are those of ``normalized``. The erasure needs no normalised pixels.
    """
    _erase_bytes(planes, augment, ops, generators)
    return planes.copy()


def _erase_bytes(
    planes: NDArray[np.uint8],
    augment: spec.AugmentSpec,
    ops: Sequence[spec.Op],
    generators: Callable[[int], Generator],
) -> None:
    if ops and isinstance(ops[-1], spec.RandomErase):
        for row, image in enumerate(planes):
            boxes = drawn(ops[-1], generators(row), image.shape)
            write_pixels(image, boxes, augment.mean, augment.std)


def write_pixels(
    image: NDArray[np.uint8],
    boxes: Sequence[tuple[Box, NDArray[np.float32]]],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Writes noise of the mean and deviation of the data into boxes of an image (C, H, W).

    Args:
        boxes: boxes and their noise N(0, 1), (C, h, w) or (C, 1, 1).
        mean: one value, or one per channel, of values in 0..1.
        std: one value, or one per channel.
    """
    means, stds = (np.array(value, np.float64).reshape(-1, 1, 1) * 255 for value in (mean, std))
    for box, noise in boxes:
        image[box.place] = np.clip(np.trunc(means + stds * noise), 0, 255)


# ------------------------------------------------------------------------------------------- draws


def drawn(
    op: spec.RandomErase, generator: Generator, shape: tuple[int, ...]
) -> list[tuple[Box, NDArray[np.float32]]]:
    """The boxes of one view, and what they get.

    Args:
        shape: (C, H, W) of the view.

    Returns:
        Pairs of a box and noise N(0, 1) in it: (C, h, w), or (C, 1, 1) where it is uniform.
    """
    channels, *size = shape
    pairs = []
    for box in boxes(op, generator, (size[0], size[1])):
        extent = (channels, box.height, box.width) if op.mode == "pixel" else (channels, 1, 1)
        noise = np.zeros(extent, np.float32)
        if op.mode != "const":
            generator.standard_normal(dtype=np.float32, out=noise)
        pairs.append((box, noise))
    return pairs


def boxes(op: spec.RandomErase, generator: Generator, size: Size) -> list[Box]:
    """The boxes of one view; none with probability 1 - p, and fewer where they do not fit.

    Args:
        size: (height, width) of the view, pixels.
    """
    if generator.random() >= op.p:
        return []
    low, high = op.count
    count = low if low == high else int(generator.integers(low, high, endpoint=True))
    found = (_box(op, generator, size, count) for _ in range(count))
    return [box for box in found if box is not None]


def _box(op: spec.RandomErase, generator: Generator, size: Size, count: int) -> Box | None:
    """One of ``count`` boxes that share the drawn area; None if it does not fit."""
    height, width = size
    logs = math.log(op.ratio[0]), math.log(op.ratio[1])
    for _ in range(ATTEMPTS):
        area = generator.uniform(*op.area) * height * width / count
        ratio = math.exp(generator.uniform(*logs))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if op.fit == "cut":
            h, w = min(h, height), min(w, width)
        elif h >= height or w >= width:
            continue
        top = int(generator.integers(height - h, endpoint=True))
        left = int(generator.integers(width - w, endpoint=True))
        return Box(top, left, h, w)
    return None
