"""The bytes of a Pillow image, and its resize to planes by compiled loops."""

import math

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


def resize(
    kernels: Kernels,
    image: Image.Image,
    box: tuple[int, int, int, int],
    cubic: bool,
    mirrored: bool,
    out: NDArray[np.uint8],
) -> bool:
    """Writes a part of an image to planes, as ``pixels.crop_resize`` would make it.

    Args:
        box: top, left, height and width of the part, within the image.
        cubic: bicubic, else bilinear.
        mirrored: exchanges left and right of the result.
        out: (C, H, W), one plane for each band.

    Returns:
        Whether it was possible.
    """
    top, left, height, width = box
    if height > TALL * width:
        return False
    pixels, size = stored(crop(image, (left, top, left + width, top + height)))
    channels, high, wide = out.shape
    starts, table, taps = _weights(kernels, width, wide, cubic)
    if mirrored:
        starts, table = starts[::-1].copy(), table[::-1].copy()
    rows = np.empty((height, wide, size), np.uint8)
    across = kernels.resize_across if size == 4 else kernels.resize_grey_across
    weights = address(starts), address(table), taps
    across(address(pixels), width * size, height, *weights, wide, address(rows))
    starts, table, taps = _weights(kernels, height, high, cubic)
    sums = np.empty(wide * size, np.int32)
    weights = address(starts), address(table), taps
    kernels.resize_down(
        address(rows), height, wide, *weights, high, channels, address(sums), address(out)
    )
    return True


def _weights(
    kernels: Kernels, source: int, target: int, cubic: bool
) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """See the kernel ``resize_weights``."""
    reach = (2.0 if cubic else 1.0) * max(source / target, 1.0)
    starts, taps = np.empty(target, np.int64), np.empty(1, np.int64)
    table = np.empty(target * (2 * math.ceil(reach) + 1), np.int32)
    pointers = address(starts), address(taps), address(table)
    kernels.resize_weights(source, target, int(cubic), *pointers)
    count = int(taps[0])
    return starts, table[: target * count].reshape(target, count), count
