"""A part of Pillow's bilinear resize, without the rest of its result.

Pillow's ``resize(box=...)`` takes the box in single precision, so its weights differ from those of
the whole image. Here NumPy resamples the long axis with the arithmetic of Pillow's resize: weights
in double precision, rounded to 22 binary places; sums in integers, rounded to 8 bits after each
axis.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core.data.pillow import crop

_PLACES = 22
"""Binary places of a weight."""


def resized_part(
    image: Image.Image, whole: tuple[int, int], box: tuple[int, int, int, int]
) -> Image.Image:
    """``image.resize(whole, BILINEAR).crop(box)``, pixel for pixel, but only the box is computed.

    Args:
        image: mode L or RGB.
        whole: (height, width) of the whole result, which is long on one axis.
        box: top, left, height and width of the part, within ``whole``.
    """
    top, left, height, width = box
    tall = whole[0] * width >= whole[1] * height
    long = (
        _Axis(image.height, whole[0], top, height)
        if tall
        else _Axis(image.width, whole[1], left, width)
    )
    if not tall:
        part = crop(image, (long.first, 0, long.last, image.height))
        part = _turn(long.resample(_turn(part)))
        part = part.resize((width, whole[0]), Image.Resampling.BILINEAR)
        return crop(part, (0, top, width, top + height))
    part = crop(image, (0, long.first, image.width, long.last))
    # Pillow resamples a very tall image that becomes lower along its columns first.
    columns_first = image.height > image.width * 100 and whole[0] < image.height
    part = long.resample(part) if columns_first else part
    part = part.resize((whole[1], part.height), Image.Resampling.BILINEAR)
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

    def __init__(self, source: int, target: int, start: int, count: int) -> None:
        """Computes the weights.

        Args:
            source: number of rows of the image.
            target: number of rows of the whole result.
            start: first row of the part of the result.
            count: number of rows of that part.
        """
        self._weights = [_weights(source, target, row) for row in range(start, start + count)]
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


def _weights(source: int, target: int, row: int) -> tuple[int, NDArray[np.int64]]:
    """Weights (n,) of the n rows of the image that make a row of the result, and the first one."""
    scale = float(np.float32(source)) / target
    reach = max(scale, 1.0)
    center = (row + 0.5) * scale
    begin = max(int(center - reach + 0.5), 0)
    end = min(int(center + reach + 0.5), source)
    distance = np.abs((np.arange(begin, end) - center + 0.5) * (1.0 / reach))
    weights = np.where(distance < 1.0, 1.0 - distance, 0.0)
    total = float(np.cumsum(weights)[-1])  # summed in Pillow's order: the last bit matters
    if total:
        weights = weights / total
    return begin, (weights * (1 << _PLACES) + 0.5).astype(np.int64)
