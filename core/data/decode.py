"""Reading one image file, strictly: what is damaged is an error and never half an image."""

import os
import stat
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from triptych.core.errors import UserError, printable

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's name of an 8-bit image by number of channels."""

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# What Pillow's readers raise on files that are cut short, overwritten, or not images at all.
_DAMAGE = (
    Image.DecompressionBombError,
    EOFError,
    IndexError,
    KeyError,
    OSError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class DamagedImage(UserError):
    """A file that cannot be read as an image, named."""


def decode(path: str, mode: str) -> Image.Image:
    """The pixels stored in a file, in one of ``MODES``.

    An orientation noted beside the pixels (EXIF) is ignored, as torchvision's folders ignore it:
    pixels, not notes, are what published models were trained on.

    Raises:
        DamagedImage: not there, not an image, or damaged.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")  # reading a pipe might never end
        with warnings.catch_warnings():
            # Pillow warns below the size that it refuses; that is no news for a user.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return to_mode(image, mode)
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image in a known format"
        raise DamagedImage(
            f"{printable(path)}: damaged image ({' '.join(reason.split())}); repair or remove it, "
            "or set data.on_error: skip"
        ) from error


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image in one of ``MODES``: palettes looked up, 16-bit grey cut to its upper 8 bits.

    Colour becomes grey by its luminance (ITU-R 601); alpha that is not wanted is dropped, alpha
    that is missing is opaque.

    Raises:
        ValueError: 32-bit pixels, whose range is not known, or no conversion.
    """
    if image.mode == mode:
        return image
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels of mode {image.mode} have no known range")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in MODES.values():
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.convert(mode)
