"""The bytes of a Pillow image, and its resize to planes by compiled loops."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core.data.compiled import Kernels, address
from triptych.core.data.pillow import crop

TALL = 100
"""Pillow resamples an image whose height is more than this multiple of its width in another
order."""
_RAW = {"RGB": "RGBX", "RGBA": "RGBA"}
"""Mode -> Pillow's name of the form in which a pixel has four bytes."""


def stored(image: Image.Image) -> tuple[NDArray[np.uint8], int]:
    """The bytes of an image of mode L, LA, RGB or RGBA, as Pillow keeps them.

    Pillow's export by Arrow would save the copy, but ends the process now and then.

    Returns:
        The bytes of all pixels, row by row.
        The number of bytes of a pixel. L has one. The others have four: L, L, L, A or R, G, B, A.
    """
    if image.mode == "L":
        return np.frombuffer(image.tobytes(), np.uint8), 1
    if image.mode not in _RAW:
        image = image.convert("RGBA")
    return np.frombuffer(image.tobytes("raw", _RAW[image.mode]), np.uint8), 4


class Part(NamedTuple):
    """What a view takes from an image: a box of it, at another size, and a window of that.

    Attributes:
        box: top, left, height and width of the part of the image, pixels.
        size: (height, width) of the resized box.
        corner: top and left of the window in the resized box. The view gives its size.
        cubic: bicubic, else bilinear.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    corner: tuple[int, int]
    cubic: bool


def resize(
    kernels: Kernels, image: Image.Image, part: Part, mirrored: bool, out: NDArray[np.uint8]
) -> bool:
    """Writes a part of an image to planes. Its bytes are those of ``pixels.resize`` and crops.

    Args:
        part: its box is within the image, its window within the resized box.
        mirrored: exchanges left and right of the result.
        out: (C, H, W), one plane for each band.

    Returns:
        Whether it was possible.
    """
    top, left, height, width = part.box
    if height > TALL * width:
        return False
    if (height, width) != (image.height, image.width):
        image = crop(image, (left, top, left + width, top + height))
    pixels, size = stored(image)
    channels, high, wide = out.shape
    across, row = _weights(kernels, width, part.size[1], part.cubic, part.corner[1], wide)
    if mirrored:
        across, row = across[::-1].copy(), row[::-1].copy()
    down, column = _weights(kernels, height, part.size[0], part.cubic, part.corner[0], high)
    # Only the rows that the window needs are resampled.
    first, last = int(down.min()), int(down.max()) + column.shape[1]
    down -= first
    rows = np.empty((last - first, wide, size), np.uint8)
    resample = kernels.resize_across if size == 4 else kernels.resize_grey_across
    needed, weights = address(pixels) + first * width * size, (address(across), address(row))
    resample(needed, width * size, len(rows), *weights, row.shape[1], wide, address(rows))
    weights, sums = (address(down), address(column)), np.empty(wide * size, np.int32)
    shape = column.shape[1], high, channels
    kernels.resize_down(
        address(rows), len(rows), wide, *weights, *shape, address(sums), address(out)
    )
    return True


def _weights(
    kernels: Kernels, source: int, target: int, cubic: bool, start: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """``count`` rows, from ``start`` on, of what the kernel ``resize_weights`` computes."""
    reach = (2.0 if cubic else 1.0) * max(source / target, 1.0)
    starts, taps = np.empty(target, np.int64), np.empty(1, np.int64)
    table = np.empty(target * (2 * math.ceil(reach) + 1), np.int32)
    pointers = address(starts), address(taps), address(table)
    kernels.resize_weights(source, target, int(cubic), *pointers)
    each, window = int(taps[0]), slice(start, start + count)
    return starts[window], table[: target * each].reshape(target, each)[window]
