"""Reads TIFF images with their stored pixels.

Pillow turns a TIFF image by its orientation tag, divides colours by an associated alpha, drops a
fourth band of unspecified meaning, and does not know several layouts of two to four bands. Here
the tags that cause this are replaced before Pillow looks at them.
"""

import sys
from typing import IO

from PIL import TiffImagePlugin
from PIL.ImageFile import _Tile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLESPERPIXEL,
    TiffImageFile,
)

PREFIXES = tuple(TiffImagePlugin.PREFIXES)
"""A TIFF file begins with one of these."""
MOST_BANDS = 4

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_ASSOCIATED, _UNASSOCIATED = 1, 2
_SEPARATE = 2


class BandsError(Exception):
    """An image has more bands than any model takes. The message gives their number."""


class StoredTiff(TiffImageFile):
    """A TIFF image whose pixels are the stored ones, in the stored direction.

    Attributes:
        pair_order: byte order ("<" or ">") of an image of grey and an extra band, both of 16 bits.
            Such an image has mode RGBA, whose four bands are the bytes of the two samples. Every
            other layout has "".
        interleaved: false if the bands are separate, compressed planes.
    """

    pair_order = ""
    interleaved = True

    def __init__(self, file: IO[bytes], name: str, *, as_bands: bool) -> None:
        """Opens the file.

        Args:
            as_bands: whether an associated alpha is a plain band, by which no colour is divided.
        """
        self._as_bands = as_bands
        super().__init__(file, name)

    def _setup(self) -> None:
        count = self.tag_v2.get(SAMPLESPERPIXEL, 1)
        if count > MOST_BANDS:
            raise BandsError(f"{count} bands")
        deep = self.tag_v2.get(BITSPERSAMPLE, (1,))[0] == 16
        separate = self.tag_v2.get(PLANAR_CONFIGURATION) == _SEPARATE
        self._name_bands(count)
        if count == 2 and deep:
            self.tag_v2[BITSPERSAMPLE] = (8, 8)  # as pairs of bytes: Pillow has no mode for them
        super()._setup()
        self._size = self._tile_size
        self.interleaved = not (separate and self.use_load_libtiff)
        if count == 2 and deep:
            self.tag_v2[BITSPERSAMPLE] = (16, 16)
            self._read_pairs(separate)
        elif separate and count > 1 and self.interleaved:
            self._read_planes(count, deep)

    def _name_bands(self, count: int) -> None:
        """Names the bands: two are grey and alpha, three are colour, four are colour and alpha."""
        photometric = self.tag_v2.get(PHOTOMETRIC_INTERPRETATION, _WHITE_IS_ZERO)
        if count == 1 or photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
            return
        divided = photometric == _RGB and self.tag_v2.get(EXTRASAMPLES) == (_ASSOCIATED,)
        if divided and not self._as_bands:
            return
        self.tag_v2[PHOTOMETRIC_INTERPRETATION] = _BLACK_IS_ZERO if count == 2 else _RGB
        self.tag_v2[EXTRASAMPLES] = () if count == 3 else (_UNASSOCIATED,)

    def _read_pairs(self, separate: bool) -> None:
        if separate:
            raise SyntaxError("two planes of 16 bits")
        # libtiff gives samples in the byte order of this machine.
        little = sys.byteorder == "little" if self.use_load_libtiff else self.tag_v2._endian == "<"
        self.pair_order = "<" if little else ">"
        self._mode = "RGBA"
        twice = 1 if self.use_load_libtiff else 2  # bytes of a row that is wider than its image
        self.tile = [
            tile._replace(args=("RGBA", tile.args[1] * twice, *tile.args[2:]))
            for tile in self.tile
            if isinstance(tile.args, tuple)
        ]

    def _read_planes(self, count: int, deep: bool) -> None:
        """Names the planes of an uncompressed file. Pillow names only planes of 8 bits itself."""
        suffix = (";16L" if self.tag_v2._endian == "<" else ";16B") if deep else ""
        planes = [(plane, "RGBA"[plane]) for plane in range(count)]
        if count == 2:  # Pillow cannot fill LA plane by plane
            self._mode, planes = "RGBA", [(0, "R"), (0, "G"), (0, "B"), (1, "A")]
        each = len(self.tile) // count
        self.tile = [
            _Tile(tile.codec_name, tile.extents, tile.offset, (band + suffix, *tile.args[1:]))
            for plane, band in planes
            for tile in self.tile[plane * each : (plane + 1) * each]
            if isinstance(tile.args, tuple)
        ]

    def load_end(self) -> None:
        """Leaves the image in its stored direction; Pillow would turn it here."""
