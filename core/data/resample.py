"""A part of Pillow's resize, without the rest of its result.

Pillow's ``resize(box=...)`` takes the box in single precision, so its weights differ from those of
the whole image. Here NumPy resamples the long axis with the arithmetic of Pillow's resize: weights
in double precision, rounded to 22 binary places; sums in integers, rounded to 8 bits after each
axis.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core.data.pillow import crop

_PLACES = 22
"""Binary places of a weight."""


_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_REACH = {"bilinear": 1.0, "bicubic": 2.0}


def resized_part(
    image: Image.Image,
    whole: tuple[int, int],
    box: tuple[int, int, int, int],
    interpolation: Literal["bilinear", "bicubic"],
) -> Image.Image:
    """``image.resize(whole).crop(box)``, pixel for pixel, but only the box is computed.

    Args:
        image: mode L or RGB.
        whole: (height, width) of the whole result, which is long on one axis.
        box: top, left, height and width of the part, within ``whole``.
    """
    top, left, height, width = box
    tall = whole[0] * width >= whole[1] * height
    long = (
        _Axis(image.height, whole[0], top, height, interpolation)
        if tall
        else _Axis(image.width, whole[1], left, width, interpolation)
    )
    if not tall:
        part = crop(image, (long.first, 0, long.last, image.height))
        part = _turn(long.resample(_turn(part)))
        part = part.resize((width, whole[0]), _FILTERS[interpolation])
        return crop(part, (0, top, width, top + height))
    part = crop(image, (0, long.first, image.width, long.last))
    # Pillow resamples a very tall image that becomes lower along its columns first.
    columns_first = image.height > image.width * 100 and whole[0] < image.height
    part = long.resample(part) if columns_first else part
    part = part.resize((whole[1], part.height), _FILTERS[interpolation])
    part = crop(part, (left, 0, left + width, part.height))
    return part if columns_first else long.resample(part)


def _turn(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.TRANSPOSE)


class _Axis:
    """The long axis: the rows of the image that the result needs, and their weights.

    Attributes:
        first: first needed row.
        last: row after the last needed one.
    """

    def __init__(
        self, source: int, target: int, start: int, count: int, interpolation: str
    ) -> None:
        """Computes the weights.

        Args:
            source: number of rows of the image.
            target: number of rows of the whole result.
            start: first row of the part of the result.
            count: number of rows of that part.
            interpolation: bilinear or bicubic.
        """
        rows = range(start, start + count)
        self._weights = [_weights(source, target, row, interpolation) for row in rows]
        self.first = self._weights[0][0]
        self.last = max(begin + len(weights) for begin, weights in self._weights)

    def resample(self, part: Image.Image) -> Image.Image:
        """Computes the rows of the result from ``part``, the needed rows of the image."""
        rows = np.asarray(part).astype(np.int64)
        half = 1 << (_PLACES - 1)
        sums = [
            np.tensordot(weights, rows[begin - self.first :][: len(weights)], 1) + half
            for begin, weights in self._weights
        ]
        values = np.clip(np.stack(sums) >> _PLACES, 0, 255).astype(np.uint8)
        return Image.fromarray(values)


def _weights(
    source: int, target: int, row: int, interpolation: str
) -> tuple[int, NDArray[np.int64]]:
    """Weights (n,) of the n rows of the image that make a row of the result, and the first one."""
    scale = float(np.float32(source)) / target
    widening = max(scale, 1.0)
    reach = _REACH[interpolation] * widening
    center = (row + 0.5) * scale
    begin = max(int(center - reach + 0.5), 0)
    end = min(int(center + reach + 0.5), source)
    distance = np.abs((np.arange(begin, end) - center + 0.5) * (1.0 / widening))
    weights = _cubic(distance) if interpolation == "bicubic" else np.maximum(1.0 - distance, 0.0)
    total = float(np.cumsum(weights)[-1])  # summed in Pillow's order: the last bit matters
    if total:
        weights = weights / total
    return begin, (weights * (1 << _PLACES) + np.copysign(0.5, weights)).astype(np.int64)


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cubic filter of parameter -0.5 at distances >= 0."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
