"""Reduces samples of 16 bits to 8 bits."""

import os
import struct
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

Deep = NDArray[np.uint16]

Again = Callable[[], AbstractContextManager[Image.Image]]
"""Opens a file once more."""

USED = "triptych: bits used"
"""Key of ``Image.info``: (bits of the largest 16-bit sample, bits that became the 8)."""

_AS_GREY = "triptych: colours as grey"
"""Key of ``Image.info``: each three samples of a row are one pixel."""

_MAX_SAMPLE_VALUES = (281, 341)  # TIFF's MaxSampleValue and SMaxSampleValue
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def eight_bits(image: Image.Image, asked: int | None, again: Again | None = None) -> Image.Image:
    """The image with samples of 8 bits. Of 16-bit samples it keeps the upper 8 of the used bits.

    Args:
        image: of any mode; opened but not loaded, if ``again`` is given.
        asked: number of used bits, 8 to 16. None: the number that the file states, else 16.
        again: opens the file once more. Without it, 16-bit colour keeps Pillow's cut to 8 bits.

    Returns:
        The loaded image itself if it has no 16-bit samples. Else a new image with ``info[USED]``.

    """
    largest = _largest_of_portable(image)
    if again and image.mode == "RGB" and largest:
        _take_colours_for_grey(image, largest)
    raw = raw_mode(image)
    stated = _stated(image)
    if raw == "LA;16B":  # Pillow would drop the low bytes
        set_raw_mode(image, lambda _: "RGBA")
    colour = again is not None and ";16" in raw and image.mode in ("RGB", "RGBA", "CMYK")
    colour = colour and raw != "LA;16B"
    image.load()
    if colour and (asked or stated or 16) == 16:
        top = int(np.asarray(image).max(initial=0))
        if top:  # else the low bytes may hold all there is
            image.info[USED] = (top << 8).bit_length(), 16
            return image
    values = _colour(image, again) if colour and again else _samples(image, raw)
    if values is None:
        return image
    if asked and largest:  # Pillow has scaled the samples to 16 bits
        values = np.rint(values * (largest / 65535)).astype(np.uint16)
    if asked is None and isinstance(image, PngImageFile) and stated and not _low(values, stated):
        stated = None
    return _cut(values, asked or stated or 16, image.mode if colour else "")


def _cut(values: Deep, bits: int, mode: str) -> Image.Image:
    array = np.minimum(values >> (bits - 8), 255).astype(np.uint8)
    mode = mode or ("L" if array.ndim == 2 else {2: "LA", 3: "RGB"}[array.shape[2]])
    image = Image.frombytes(mode, (array.shape[1], array.shape[0]), array.tobytes())
    image.info[USED] = int(values.max(initial=0)).bit_length(), bits
    return image


def _samples(image: Image.Image, raw: str) -> Deep | None:
    """Samples (H, W), (H, W, 2) with alpha or (H, W, 3); None for an image of 8-bit samples."""
    order = ">" if raw == "LA;16B" else getattr(image, "pair_order", "")
    if order:
        return np.asarray(image).view(f"{order}u2").astype(np.uint16)
    # Pillow scales the samples of a portable grey map to 16 bits, in a mode of 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        values = np.asarray(image).astype(np.uint16)
        return values.reshape(len(values), -1, 3) if _AS_GREY in image.info else values
    return None


def _largest_of_portable(image: Image.Image) -> int | None:
    """The largest value of a portable map of 16-bit samples by its own account, else None."""
    tiles = getattr(image, "tile", None)
    if image.format != "PPM" or not tiles or not tiles[0].codec_name.startswith("ppm"):
        return None
    largest = tiles[0].args[-1]
    return largest if isinstance(largest, int) and largest > 255 else None


def _take_colours_for_grey(image: Image.Image, largest: int) -> None:
    """Opens a colour map as a grey one of three times the width: Pillow keeps 16 bits of grey."""
    file: Any = image
    file._size = 3 * image.width, image.height
    file._mode = "I"
    file.tile = [file.tile[0]._replace(extents=(0, 0, *file.size), args=("I", largest))]
    file.info[_AS_GREY] = True


def _colour(image: Image.Image, again: Again) -> Deep:
    """Samples (H, W, C) of their high bytes, which Pillow reads, and their low bytes.

    The same file gives its low bytes if it is read in the other byte order.
    """
    with again() as other:
        set_raw_mode(other, lambda raw: raw[:-1] + _OTHER_BYTE[raw[-1]])
        other.load()
        low = np.asarray(other)
    values: Deep = np.asarray(image).astype(np.uint16) << 8 | low
    return values


# ------------------------------------------------------------------------------- what a file says


def _stated(image: Image.Image) -> int | None:
    """Number of used bits that an opened file states, 8 to 15; None: all 16."""
    if isinstance(image, TiffImageFile):
        bits = _numbers(image.tag_v2.get(BITSPERSAMPLE))
        tops = [top for tag in _MAX_SAMPLE_VALUES for top in _numbers(image.tag_v2.get(tag))]
        bits += [max(tops).bit_length()] if tops and max(tops) > 0 else []
    elif isinstance(image, PngImageFile) and image.fp is not None:
        bits = _significant_bits(image.fp)
    else:
        return None
    least = max(min(bits, default=16), 8)
    return least if least < 16 else None


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, tuple) else (value,)
    return [int(each) for each in values if isinstance(each, int | float) and 0 <= each < 1 << 16]


def _significant_bits(file: IO[bytes]) -> list[int]:
    """The largest number in PNG's sBIT chunk, if there is one. Keeps the position in the file."""
    here = file.tell()
    file.seek(8)
    largest: list[int] = []
    while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
        (length,) = struct.unpack(">I", head[:4])
        if head[4:] == b"sBIT":
            largest = [max(file.read(length), default=16)]
            break
        file.seek(length + 4, os.SEEK_CUR)
    file.seek(here)
    return largest


def _low(values: Deep, bits: int) -> bool:
    """Whether samples of ``bits`` bits lie in the lowest bits of their 16.

    PNG asks for samples scaled to all 16 bits (PNG specification, 11.3.2.4), which many writers do
    not do. Scaled samples of n bits are multiples of 2^(16 - n), or near multiples of
    65535 / (2^n - 1).
    """
    if int(values.max(initial=0)) >> bits:
        return False
    step = 65535 / ((1 << bits) - 1)
    scaled = np.abs(np.rint(values / step) * step - values) <= 1
    shifted = values % (1 << (16 - bits)) == 0
    return not bool((scaled | shifted).all())


# --------------------------------------------------------------------- Pillow's stored layouts


def raw_mode(image: Image.Image) -> str:
    """Pillow's name for the stored layout of a file that is not loaded yet, else ""."""
    tiles = getattr(image, "tile", None)
    first = tiles[0].args if tiles else ""
    if isinstance(first, tuple) and first:
        first = first[0]
    return first if isinstance(first, str) else ""


def set_raw_mode(image: Image.Image, change: Callable[[str], str]) -> None:
    """Makes Pillow read the stored samples in another layout of the same size."""
    file: Any = image
    file.tile = [tile._replace(args=_changed(tile.args, change)) for tile in file.tile]


def _changed(args: Any, change: Callable[[str], str]) -> Any:
    return change(args) if isinstance(args, str) else (change(args[0]), *args[1:])
