"""Finds the images below a folder, and counts the other files."""

import os
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from PIL import Image

from triptych.core.data.index import Witness, stamp, witness
from triptych.core.data.tiff import PREFIXES
from triptych.core.files.writing import Say

ENDINGS = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .icb .im .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg "
    ".jpx .mpo .pbm .pfm .pgm .png .pnm .ppm .qoi .tga .tif .tiff .vda .vst .webp".split()
)
"""Endings of image files, in lower case. Such a file is not opened."""

REFUSED = frozenset(
    ".3fr .arw .cr2 .cr3 .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .rw2 "
    ".rwl .sr2 .srf .srw .x3f .crdownload .download .part .partial".split()
)
"""Endings of files that begin like an image, but are not images for training.

A camera's raw file begins like a TIFF file, and Pillow reads only its small preview. The last four
endings are those of unfinished downloads.
"""

FORMATS = (
    *("AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "FITS", "FLI", "FTEX", "GIF", "ICNS", "ICO"),
    *("JPEG", "JPEG2000", "MSP", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SUN", "WEBP"),
    *("XBM", "XPM"),
)
"""Pillow's formats that are recognised in a file of unknown ending, by the first bytes."""

SYSTEM_FOLDERS = frozenset(
    "#recycle #snapshot $recycle.bin @eadir @recycle @recently-snapshot @sharebin @tmp __macosx "
    "found.000 lost+found recycler ~snapshot".split()
) | {"network trash folder", "system volume information", "temporary items"}
"""Folders that file servers and operating systems make, in lower case."""

ENOUGH = 1000
"""After so many files of one ending without an image, further ones are not opened."""
PERIOD = 5.0
"""Seconds between two lines about the progress."""
SHOWN = 8
"""Most kinds of files that are counted in one line."""


@dataclass
class Scan:
    """The content of a folder.

    Attributes:
        names: paths of the images relative to the folder, in the order of ``order``.
        others: kind -> number of files and folders that were passed over. The kind is an ending,
            the name of a system's folder, or a description.
        tops: names of the folders directly inside.
        witnesses: the folders that were read and the files that were opened.
    """

    names: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    tops: set[str] = field(default_factory=set)
    witnesses: list[Witness] = field(default_factory=list)

    def passed_over(self) -> str:
        """The counts in one line, e.g. "3 .txt, 1 .db"; empty if there are none."""
        kinds = sorted(self.others.items(), key=lambda kind: (-kind[1], kind[0]))
        parts = [f"{count} {kind}" for kind, count in kinds[:SHOWN]]
        more = sum(count for _, count in kinds[SHOWN:])
        return ", ".join([*parts, f"{more} others"] if more else parts)


class Progress:
    """Says now and then how many files were seen, while a large folder or tar is read."""

    def __init__(self, at: str, say: Say) -> None:
        """Lines begin with ``at``."""
        self._at, self._say, self._due = at, say, time.monotonic() + PERIOD

    def __call__(self, count: int) -> None:
        """Counts are said every ``PERIOD`` seconds."""
        if count % 1024 == 0 and time.monotonic() >= self._due:
            self._due += PERIOD
            self._say(f"{self._at}: looking for images: {count} files so far")


def scan(root: str, progress: Progress | None = None) -> Scan:
    """All images below a folder, at any depth. Links are followed, hidden names passed over.

    The ending shows an image. A file of unknown ending, or of none, is opened, and its first bytes
    show an image. If the first ``ENOUGH`` files of an ending are no images, further ones are not
    opened.

    Raises:
        OSError: a folder cannot be read.
    """
    result = Scan()
    unknown: list[str] = []
    for count, (path, is_image) in enumerate(_files(root, "", (), result)):
        if progress is not None:
            progress(count)
        (result.names if is_image else unknown).append(path)
    result.names += _recognised(root, sorted(unknown, key=order), result)
    result.names.sort(key=order)
    return result


def ending(path: str) -> str:
    """The ending of a name with its dot, in lower case; empty if it cannot name a format."""
    tail = os.path.splitext(path)[1].lower()
    plain = 2 <= len(tail) <= 12 and tail.isascii() and tail[1:].isalnum()
    return tail if plain and not tail[1:].isdecimal() else ""


def order(name: str) -> str:
    """Key for sorting names: their bytes read as UTF-8, in any locale."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def _files(
    root: str, inside: str, above: tuple[tuple[int, int], ...], result: Scan
) -> Iterator[tuple[str, bool]]:
    """Paths relative to ``root``, in no order, and whether their ending is an image's.

    Counts hidden files and folders of systems.

    Args:
        above: identities of the folders that contain ``inside``.
    """
    folder = os.path.join(root, inside)
    here = os.stat(folder)  # before the folder is read, so that a change meanwhile is noticed
    identity = (here.st_dev, here.st_ino)
    if identity in above:  # a link to a folder that contains it
        return
    result.witnesses.append(Witness(os.path.abspath(folder), stamp(here)))
    with os.scandir(folder) as entries:
        for entry in entries:
            path = os.path.join(inside, entry.name)
            if entry.name.startswith("."):
                result.others["hidden"] += 1
            elif entry.name.lower() in SYSTEM_FOLDERS:
                result.others[entry.name] += 1
            elif entry.is_dir():
                if not inside:
                    result.tops.add(path)
                yield from _files(root, path, (*above, identity), result)
            elif (is_image := ending(entry.name) in ENDINGS) or entry.is_file():
                yield path, is_image
            else:
                result.others["not a file"] += 1  # reading a pipe might never end


def _recognised(root: str, names: Iterable[str], result: Scan) -> Iterator[str]:
    """The names of files that begin like an image. Counts the others by their ending."""
    refusals = Counter[str]()
    images = set[str]()
    for name in names:
        kind = ending(name)
        decided = kind in REFUSED or (refusals[kind] >= ENOUGH and kind not in images)
        path = os.path.join(root, name)
        if not decided:
            with suppress(OSError):  # a file that is gone is no image
                result.witnesses.append(witness(os.path.abspath(path)))
        if not decided and _is_image(path):
            images.add(kind)
            yield name
        else:
            refusals[kind] += 1
            result.others[kind or "without ending"] += 1


def _is_image(path: str) -> bool:
    """Whether Pillow knows the format by the first bytes; no pixel is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with open(path, "rb") as file:
                if file.read(4) in PREFIXES:  # TIFF: ``StoredTiff`` reads more kinds than Pillow
                    return True
                file.seek(0)
                with Image.open(file, formats=FORMATS):
                    return True
        except Image.DecompressionBombError:
            return True  # an image that is too large is an image
        except _UNKNOWN:
            return False


_UNKNOWN = (OSError, EOFError, KeyError, IndexError, OverflowError, SyntaxError, ValueError)
"""Exceptions of Pillow's readers on a file that only begins like an image."""
