"""Reads image files strictly: a damaged file is an error and never gives half an image."""

import errno
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import IO, Literal

import PIL
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import StubImageFile

from triptych.core.config.spec import DataSpec
from triptych.core.data.bits import USED, eight_bits, raw_mode, set_raw_mode
from triptych.core.data.pillow import standard_error, switches
from triptych.core.data.tiff import MOST_BANDS, PREFIXES, BandsError, StoredTiff
from triptych.core.errors import UserError, printable

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Number of channels -> Pillow's mode of an 8-bit image."""

NOTES = "triptych: notes"
"""Key of ``Image.info``: the warnings of libraries while they read the file, a tuple of texts."""

# Exceptions of Pillow's readers on files that are cut short, overwritten, or no images.
_DAMAGE = (
    AssertionError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation tag -> operation that makes the image upright (Exif 2.3, section 4.6.4)."""

# Stored layout -> the one that keeps the fourth band, which Pillow drops.
_WITH_FOURTH = {"BGRX": "BGRA", "RGBX": "RGBA"}
_OWN_FOURTH = ("BMP", "DIB")

_UNSUPPORTED = re.compile("support|not available|not yet|Ghostscript", re.IGNORECASE)


class DamagedImage(UserError):
    """A file cannot be read as an image: it is damaged, not understood, or over a limit."""


class _NotUnderstood(Exception):
    """The file may be intact, but Pillow cannot read its format."""


@dataclass(frozen=True)
class Decoding:
    """How stored pixels become 8-bit images, from keys of the section ``data``.

    Attributes:
        mode: one of ``MODES``.
        bits: number of used bits of 16-bit samples, 8 to 16; None: as the file states, else 16.
        orientation: "upright" turns an image by its orientation tag, "stored" does not.
        max_pixels: most pixels of an image; also most bytes of text in one PNG file.
    """

    mode: str
    bits: int | None = None
    orientation: Literal["stored", "upright"] = "stored"
    max_pixels: int = 10**9

    @property
    def as_bands(self) -> bool:
        """Whether the model gets the last band, alpha or another one, as stored."""
        return self.mode in ("LA", "RGBA")


def decoding(data: DataSpec) -> Decoding:
    """The decoding that a spec asks for."""
    bits = None if data.bits == "stated" else data.bits
    return Decoding(MODES[data.channels], bits, data.orientation, data.max_pixels)


def decode(path: str, how: Decoding) -> Image.Image:
    """The pixels stored in a file.

    The image's ``info`` holds ``NOTES`` if a library warned, and ``bits.USED``.

    Raises:
        DamagedImage: the file is missing, not understood, damaged, or larger than allowed.
        MemoryError: there is not enough memory for it.
    """
    return _decode(partial(_regular, path), path, how)


def decode_bytes(content: bytes, name: str, how: Decoding) -> Image.Image:
    """As ``decode``, for the content of a file that lies in an archive.

    Args:
        name: the image's name in messages.
    """
    return _decode(partial(BytesIO, content), name, how)


_Opener = Callable[[], IO[bytes]]
"""Opens the content of an image; some images are opened twice."""


def _regular(path: str) -> IO[bytes]:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise _NotUnderstood("not a regular file")  # reading a pipe might never end
    return open(path, "rb")


def _decode(open_file: _Opener, path: str, how: Decoding) -> Image.Image:
    notes: list[str] = []
    try:
        with switches(how.max_pixels, notes), _opened(open_file, path, how) as image:
            result = _read(image, open_file, path, how, notes)
    except BandsError as error:
        text = f"{error}, and data.channels is at most {MOST_BANDS}; choose bands in a copy of it"
        raise _refusal(path, text) from error
    except _NotUnderstood as error:
        raise _refusal(path, f"{error}; convert or remove it") from error
    except _DAMAGE as error:
        raise _explained(path, error, how, notes) from error
    if notes:
        result.info[NOTES] = tuple(notes)
    return result


def to_mode(image: Image.Image, how: Decoding) -> Image.Image:
    """An image of 8 bits in the mode and direction that are asked for.

    - Palettes are looked up.
    - Colour becomes grey by its luminance (ITU-R 601).
    - Alpha that is not asked for is dropped; missing alpha is opaque.
    - Four bands become four channels unchanged, also the inks of CMYK.

    Raises:
        UserError: the pixels have 32 bits, whose range is not known.
    """
    tag = _orientation(image, how)
    try:
        return _converted(_turned(eight_bits(image, how.bits), tag), how.mode)
    except _NotUnderstood as error:
        raise UserError(str(error)) from error


# ---------------------------------------------------------------------------------------- reading


@contextmanager
def _opened(open_file: _Opener, path: str, how: Decoding) -> Iterator[Image.Image]:
    with open_file() as file:
        if not file.read(1):
            raise ValueError("the file is empty")
        file.seek(0)
        yield _open(file, path, how)


@contextmanager
def _opened_beside(open_file: _Opener, path: str, how: Decoding) -> Iterator[Image.Image]:
    with _opened(open_file, path, how) as image:
        yield _beside(image)


def _beside(image: Image.Image) -> Image.Image:
    """The opened image, with its bands side by side."""
    return image.without_planes() if isinstance(image, StoredTiff) and image.in_planes else image


def _open(file: IO[bytes], path: str, how: Decoding) -> Image.Image:
    prefix = file.read(4)
    file.seek(0)
    try:
        if prefix in PREFIXES:
            return StoredTiff(file, path, as_bands=how.as_bands)
        image = Image.open(file)
    except (UnidentifiedImageError, SyntaxError) as error:
        raise _NotUnderstood(f"not an image that Pillow {PIL.__version__} understands") from error
    if isinstance(image, StubImageFile):
        raise _NotUnderstood(f"an image that Pillow {PIL.__version__} names and cannot read")
    return image


def _read(
    image: Image.Image, open_file: _Opener, path: str, how: Decoding, notes: list[str]
) -> Image.Image:
    """Loads the opened file."""
    pixels = image.width * image.height
    if pixels > how.max_pixels:
        raise _refusal(
            path,
            f"{pixels} pixels ({image.width} x {image.height}) are more than data.max_pixels, "
            f"{how.max_pixels}; raise it",
        )
    _keep_fourth_band(image, how)
    is_tiff = isinstance(image, StoredTiff)
    # Pillow reads a TIFF's tags while the file is open. A PNG's tags may follow the pixels.
    tag = _orientation(image, how) if is_tiff else 1
    with standard_error(notes) if is_tiff else nullcontext():
        result = eight_bits(_beside(image), how.bits, partial(_opened_beside, open_file, path, how))
    used = result.info.get(USED)
    tag = tag if is_tiff else _orientation(image, how)
    result = _converted(_turned(result, tag), how.mode)
    result.info = {} if used is None else {USED: used}
    return result


def _keep_fourth_band(image: Image.Image, how: Decoding) -> None:
    """Lets Pillow keep a fourth band that has no meaning in its format, e.g. in BMP."""
    raw = raw_mode(image)
    if how.as_bands and image.mode == "RGB" and raw in _WITH_FOURTH and image.format in _OWN_FOURTH:
        set_raw_mode(image, lambda raw: _WITH_FOURTH[raw])
        image._mode = "RGBA"


def _orientation(image: Image.Image, how: Decoding) -> int:
    """The orientation tag, 1 to 8; 1 (upright) if it is missing or not asked for."""
    if how.orientation == "stored":
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGE as error:
        warnings.warn(f"its orientation tag cannot be read ({error})", stacklevel=2)
        return 1


def _turned(image: Image.Image, tag: int) -> Image.Image:
    return image.transpose(_TURNS[tag]) if tag in _TURNS else image


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """An image of 8-bit samples, or of samples without a known range, in one of ``MODES``."""
    if image.mode == mode:
        return image
    if image.mode in ("I", "F"):
        raise _NotUnderstood(f"32-bit pixels of mode {image.mode} have no known range")
    if mode == "RGBA" and len(image.getbands()) == 4:
        return Image.merge(mode, image.split())
    if image.mode not in MODES.values():
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.convert(mode)


# ----------------------------------------------------------------------------------------- errors


def _refusal(path: str, text: str) -> DamagedImage:
    return DamagedImage(f"{printable(path)}: {text}, or set data.on_error: skip")


def _explained(
    path: str, error: Exception, how: Decoding, notes: Sequence[str]
) -> DamagedImage | MemoryError:
    """The error for the user that an error of a reader stands for."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "out of memory" in text or getattr(error, "errno", None) == errno.ENOMEM:
        return MemoryError(text)
    if isinstance(error, OSError) and error.errno:
        return _refusal(path, f"cannot be read: {error.strerror}; repair or remove it")
    if "MAX_TEXT" in text:
        limit = f"its text or colour profile is longer than data.max_pixels, {how.max_pixels} bytes"
        return _refusal(path, f"{limit}; raise it")
    if "decoder error" in text and notes:
        text = notes[-1]  # libtiff's message is more precise than Pillow's
    if isinstance(error, NotImplementedError) or _UNSUPPORTED.search(text):
        version = f"Pillow {PIL.__version__}"
        return _refusal(path, f"not an image that {version} understands ({text}); convert it")
    return _refusal(path, f"damaged image ({text}); repair or remove it")
