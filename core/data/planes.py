"""TIFF files whose bands lie one after another, in planes, rewritten with the bands side by side.

Pillow divides the colours of compressed planes by an associated alpha, also where the tag says that
the fourth band has no meaning; it does not know two planes, and gives no low bytes of 16 bits. So
each plane is read as a grey image of its own.
"""

import struct
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image, TiffImagePlugin
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

Entries: TypeAlias = Mapping[int, Sequence[int] | bytes]
"""Tag -> its values: a sequence of numbers, or bytes of no type."""

_DATA = TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS
_LENGTHS = TiffImagePlugin.STRIPBYTECOUNTS, TiffImagePlugin.TILEBYTECOUNTS
_TILE_WIDTH, _MAX_SAMPLE_VALUE = 322, 281
_OF_A_PLANE = (
    *(TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH, TiffImagePlugin.COMPRESSION),
    *(TiffImagePlugin.FILLORDER, TiffImagePlugin.ROWSPERSTRIP, TiffImagePlugin.PREDICTOR),
    *(_TILE_WIDTH, TiffImagePlugin.TILELENGTH, TiffImagePlugin.JPEGTABLES),
)
"""Tags that a plane has in common with the whole."""
_OF_THE_WHOLE = (
    *(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, TiffImagePlugin.EXTRASAMPLES),
    *(_MAX_SAMPLE_VALUE, 341),
)
"""Tags of the file that stay true when its bands lie side by side."""


def side_by_side(file: IO[bytes], tags: ImageFileDirectory_v2, count: int) -> bytes:
    """An uncompressed TIFF file with the samples of another one that has planes.

    Args:
        file: the other one.
        tags: its tags.
        count: number of its planes.

    Raises:
        NotImplementedError: samples of a kind that has no place in 8 or 16 bits.
        OSError, ValueError: the file is damaged.
    """
    file.seek(0)
    content, order = file.read(), "<" if tags.prefix == b"II" else ">"
    samples = np.stack(
        [_plane(tiff(content, order, _entries(tags, count, plane))) for plane in range(count)], -1
    )
    height, width = samples.shape[:2]
    bits = int(_sequence(tags[TiffImagePlugin.BITSPERSAMPLE])[0])
    deep = samples.dtype == np.uint16
    pixels = samples.astype("<u2" if deep else "u1").tobytes()
    entries = {
        **({_MAX_SAMPLE_VALUE: [(1 << bits) - 1]} if deep and bits < 16 else {}),
        **{tag: _sequence(tags[tag]) for tag in _OF_THE_WHOLE if tag in tags},
        TiffImagePlugin.IMAGEWIDTH: [width],
        TiffImagePlugin.IMAGELENGTH: [height],
        TiffImagePlugin.BITSPERSAMPLE: [16 if deep else 8] * count,
        TiffImagePlugin.COMPRESSION: [1],
        TiffImagePlugin.SAMPLESPERPIXEL: [count],
        TiffImagePlugin.ROWSPERSTRIP: [height],
        TiffImagePlugin.STRIPOFFSETS: [8],
        TiffImagePlugin.STRIPBYTECOUNTS: [len(pixels)],
    }
    return tiff(bytes(8) + pixels, "<", entries)


def tiff(content: bytes, order: str, entries: Entries) -> bytes:
    """A TIFF file of one image.

    Args:
        content: of the file from byte 0 on; its first 8 bytes are replaced.
        order: of bytes, "<" or ">".
        entries: tags; offsets among them point into ``content``.
    """
    content += bytes(len(content) % 2)
    directory, values = struct.pack(f"{order}H", len(entries)), b""
    behind = len(content) + 2 + 12 * len(entries) + 4
    for tag, numbers in sorted(entries.items()):
        typeless = isinstance(numbers, bytes)
        packed = bytes(numbers) if typeless else struct.pack(f"{order}{len(numbers)}I", *numbers)
        field = packed.ljust(4, b"\0")
        if len(packed) > 4:
            field = struct.pack(f"{order}I", behind + len(values))
            values += packed + bytes(len(packed) % 2)
        directory += struct.pack(f"{order}HHI", tag, 7 if typeless else 4, len(numbers)) + field
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(f"{order}HI", 42, len(content))
    return head + content[8:] + directory + bytes(4) + values


def _entries(tags: ImageFileDirectory_v2, count: int, plane: int) -> Entries:
    """The tags of one plane as a grey image."""
    entries = {tag: _sequence(tags[tag]) for tag in _OF_A_PLANE if tag in tags}
    for tag in (*_DATA, *_LENGTHS):
        if tag in tags:
            whole = _sequence(tags[tag])
            each = len(whole) // count
            entries[tag] = whole[plane * each : (plane + 1) * each]
    for tag in (TiffImagePlugin.BITSPERSAMPLE, TiffImagePlugin.SAMPLEFORMAT):
        if tag in tags:
            entries[tag] = _sequence(tags[tag])[:1]
    return {
        **entries,
        TiffImagePlugin.PHOTOMETRIC_INTERPRETATION: [1],
        TiffImagePlugin.SAMPLESPERPIXEL: [1],
    }


def _sequence(value: Any) -> Sequence[int] | bytes:
    return value if isinstance(value, tuple | bytes) else (value,)


def _plane(file: bytes) -> "np.typing.NDArray[np.uint8] | np.typing.NDArray[np.uint16]":
    """(H, W) samples of a grey image of 8 or 16 bits; those of fewer than 8 bits fill all 8."""
    image: Image.Image = TiffImageFile(BytesIO(file))
    image.load()
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode not in ("1", "L"):
        raise NotImplementedError(f"planes of mode {image.mode} are not supported")
    return np.asarray(image.convert("L"))
