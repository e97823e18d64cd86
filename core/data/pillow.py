"""Process-wide settings of Pillow and libtiff, changed while one image is read.

Pillow's limits are module variables, Python's warning filters are global, and libtiff prints its
messages to standard error. One lock guards all of these, so that threads decode one after another.
"""

import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, PngImagePlugin

_LOCK = threading.RLock()
_STDERR = 2


@contextmanager
def switches(max_bytes: int, notes: list[str]) -> Iterator[None]:
    """Lifts Pillow's limit on pixels, and collects warnings instead of printing them.

    Args:
        max_bytes: limit on the text and the colour profile of one PNG file, unpacked.
        notes: gets the texts of the warnings at the end of the block, each once.
    """
    with _LOCK, _limits(max_bytes), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            kinds = (UserWarning, RuntimeWarning)  # other kinds are for programmers
            said = [str(each.message) for each in caught if issubclass(each.category, kinds)]
            notes[:] = dict.fromkeys(" ".join(text.split()) for text in notes + said)


def crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """A part of an image of any size. Pillow's own method would check its limit again.

    Args:
        box: left, top, right and bottom, pixels.
    """
    with _LOCK, _limits(PngImagePlugin.MAX_TEXT_CHUNK):
        return image.crop(box)


@contextmanager
def _limits(max_bytes: int) -> Iterator[None]:
    """Sets Pillow's limits. The caller checks the number of pixels against a key of the spec."""
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    Image.MAX_IMAGE_PIXELS = None
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = max_bytes
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before[0]
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = before[1:]


@contextmanager
def standard_error(said: list[str]) -> Iterator[None]:
    """Appends to ``said`` the lines that C code prints to standard error in this block."""
    try:
        terminal = os.dup(_STDERR)
    except OSError:  # the parent process closed it
        yield
        return
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), _STDERR)
            try:
                yield
            finally:
                os.dup2(terminal, _STDERR)
                file.seek(0)
                said += file.read().decode(errors="replace").splitlines()
    finally:
        os.close(terminal)
