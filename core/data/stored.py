"""Pillow's own memory of an image, and its resize to planes by compiled loops."""

import ctypes
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core.data.compiled import Kernels, address

TALL = 100
"""Pillow resamples an image whose height is more than this multiple of its width in another
order."""


class _ArrowArray(ctypes.Structure):
    """The start of ``ArrowArray``, as the Arrow C data interface defines it."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Stored(NamedTuple):
    """The bytes of an image where Pillow keeps them.

    Attributes:
        address: of the first pixel; the rows follow each other.
        size: bytes of a pixel. L has one. The others have four: L, L, L, A or R, G, B, A.
        owner: keeps the memory.
    """

    address: int
    size: int
    owner: object


def stored(image: Image.Image) -> Stored | None:
    """The bytes of an image of mode L, LA, RGB or RGBA; None if Pillow keeps them in parts.

    Pillow does so from 16 MiB on.
    """
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:
        return None
    array = _ArrowArray.from_address(_get_pointer(capsule, b"arrow_array"))
    values = array.children[0].contents if array.n_children else array
    return Stored(values.buffers[1], values.length // (image.width * image.height), capsule)


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
    memory = None if height > TALL * width else stored(image)
    if memory is None:
        return False
    channels, high, wide = out.shape
    starts, table, taps = _weights(kernels, width, wide, cubic)
    if mirrored:
        starts, table = starts[::-1].copy(), table[::-1].copy()
    rows = np.empty((height, wide, memory.size), np.uint8)
    stride = image.width * memory.size
    across = kernels.resize_across if memory.size == 4 else kernels.resize_grey_across
    first = memory.address + top * stride + left * memory.size
    across(first, stride, height, address(starts), address(table), taps, wide, address(rows))
    starts, table, taps = _weights(kernels, height, high, cubic)
    sums = np.empty(wide * memory.size, np.int32)
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
