"""Reads TIFF images with their stored pixels.

Pillow turns a TIFF image by its orientation tag, divides colours by an associated alpha, drops a
fourth band of unspecified meaning, and does not know several layouts of two to four bands. Here
the tags that cause this are replaced before Pillow looks at them.
"""

import sys
from io import BytesIO
from typing import IO

from PIL import TiffImagePlugin
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLESPERPIXEL,
    TiffImageFile,
)

from triptych.core.data.planes import side_by_side

PREFIXES = tuple(TiffImagePlugin.PREFIXES)
"""A TIFF file begins with one of these."""
MOST_BANDS = 4

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _INK = 0, 1, 2, 5
_OF_INDEPENDENT_BANDS = (None, _WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _INK)
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
        in_planes: whether the bands lie one after another; ``without_planes`` reads such an image.
    """

    pair_order = ""
    in_planes = False

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
        self.in_planes = count > 1 and self.tag_v2.get(PLANAR_CONFIGURATION) == _SEPARATE
        self.in_planes &= self.tag_v2.get(PHOTOMETRIC_INTERPRETATION) in _OF_INDEPENDENT_BANDS
        if self.in_planes:
            # Pillow asks for a mode; the size decides whether the image is read at all.
            self._mode, self.tile = "L", []
            self._size = self.tag_v2[IMAGEWIDTH], self.tag_v2[IMAGELENGTH]
            return
        self._name_bands(count)
        if count == 2 and deep:
            self.tag_v2[BITSPERSAMPLE] = (8, 8)  # as pairs of bytes: Pillow has no mode for them
        super()._setup()
        self._size = self._tile_size
        if count == 2 and deep:
            self.tag_v2[BITSPERSAMPLE] = (16, 16)
            self._read_pairs()

    def without_planes(self) -> "StoredTiff":
        """The image of an uncompressed file in memory, with the bands side by side.

        Raises:
            NotImplementedError, OSError, ValueError: as in ``side_by_side``.
        """
        if self.fp is None:
            raise ValueError("the file is closed")
        count = self.tag_v2[SAMPLESPERPIXEL]
        content = side_by_side(self.fp, self.tag_v2, count)
        return StoredTiff(BytesIO(content), "", as_bands=self._as_bands)

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

    def _read_pairs(self) -> None:
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

    def load_end(self) -> None:
        """Leaves the image in its stored direction; Pillow would turn it here."""
