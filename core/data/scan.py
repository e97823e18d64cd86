"""Which files below a folder are images, and a count of those that are not."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from PIL import Image

from triptych.core.data.tiff import PREFIXES

ENDINGS = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo "
    ".pbm .pfm .pgm .png .pnm .ppm .qoi .tga .tif .tiff .webp".split()
)
"""Endings of image files, in lower case: such a file is taken without a look into it."""

REFUSED = frozenset(
    ".3fr .arw .cr2 .cr3 .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .rw2 "
    ".rwl .sr2 .srf .srw .x3f .crdownload .download .part .partial".split()
)
"""Endings of files that begin like an image and are none to train on.

A camera's raw file begins like a TIFF file, and what Pillow reads is its small preview; the others
are downloads that have not ended.
"""

FORMATS = (
    *("AVIF", "BMP", "DDS", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD"),
    *("QOI", "SGI", "SUN", "WEBP", "XPM"),
)
"""Pillow's formats that a file with another ending, or none, may have: those that begin with bytes
of their own."""

SYSTEM_FOLDERS = frozenset(
    "#recycle #snapshot $recycle.bin @eadir @recycle @recently-snapshot @tmp __macosx lost+found "
    "recycler".split()
) | {"system volume information"}
"""Folders that file servers and systems make beside a user's own, in lower case."""

ENOUGH = 1000
"""Files of one ending that are no images in a row of names; the rest is not opened any more."""
SHOWN = 8
"""Kinds of files that one line counts."""


@dataclass
class Scan:
    """What lies below a folder.

    Attributes:
        names: paths of the images relative to the folder, in their order.
        others: how many files and folders were passed over, by kind: an ending, the name of a
            system's folder, or words.
    """

    names: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def passed_over(self) -> str:
        """The counts in one line, e.g. "3 .txt, 1 .db"; empty if there are none."""
        kinds = sorted(self.others.items(), key=lambda kind: (-kind[1], kind[0]))
        parts = [f"{count} {kind}" for kind, count in kinds[:SHOWN]]
        more = sum(count for _, count in kinds[SHOWN:])
        return ", ".join([*parts, f"{more} others"] if more else parts)


def scan(root: str) -> Scan:
    """All images below a folder, at any depth; links are followed, hidden names passed over.

    A file is known by its ending. One with another ending, or with none, is opened and known by its
    first bytes; where the first ``ENOUGH`` of an ending are no images, the others are not opened.

    Raises:
        OSError: a folder cannot be read.
    """
    found = Scan()
    unknown: list[str] = []
    for path in _files(root, "", (), found.others):
        (found.names if ending(path) in ENDINGS else unknown).append(path)
    found.names += _recognised(root, sorted(unknown, key=order), found.others)
    found.names.sort(key=order)
    return found


def ending(path: str) -> str:
    """What stands after the last dot of a name, in lower case; empty if it names no format."""
    tail = os.path.splitext(path)[1].lower()
    plain = 2 <= len(tail) <= 12 and tail.isascii() and tail[1:].isalnum()
    return tail if plain and not tail[1:].isdecimal() else ""


def order(name: str) -> str:
    """What names are sorted by: their bytes read as UTF-8, whatever the locale."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def _files(
    root: str, inside: str, above: tuple[tuple[int, int], ...], others: Counter[str]
) -> Iterator[str]:
    """Paths relative to ``root``, in no order; hidden ones and folders of systems are counted.

    Args:
        above: identities of the folders that contain ``inside``.
    """
    here = os.stat(os.path.join(root, inside))
    identity = (here.st_dev, here.st_ino)
    if identity in above:  # a link to a folder that contains it
        return
    with os.scandir(os.path.join(root, inside)) as entries:
        for entry in entries:
            path = os.path.join(inside, entry.name)
            if entry.name.startswith("."):
                others["hidden"] += 1
            elif entry.name.lower() in SYSTEM_FOLDERS:
                others[entry.name] += 1
            elif entry.is_dir():
                yield from _files(root, path, (*above, identity), others)
            elif ending(path) in ENDINGS or entry.is_file():
                yield path
            else:
                others["not a file"] += 1  # reading a pipe might never end


def _recognised(root: str, names: Iterable[str], others: Counter[str]) -> Iterator[str]:
    """Those of ``names`` that begin like an image; the others are counted by their ending."""
    refusals = Counter[str]()
    images = set[str]()
    for name in names:
        kind = ending(name)
        decided = kind in REFUSED or (refusals[kind] >= ENOUGH and kind not in images)
        if not decided and _is_image(os.path.join(root, name)):
            images.add(kind)
            yield name
        else:
            refusals[kind] += 1
            others[kind or "without ending"] += 1


def _is_image(path: str) -> bool:
    """Whether Pillow knows the format by the first bytes; no pixel is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with open(path, "rb") as file:
                if file.read(4) in PREFIXES:  # of TIFF, of which more is read than Pillow reads
                    return True
                file.seek(0)
                with Image.open(file, formats=FORMATS):
                    return True
        except Image.DecompressionBombError:
            return True  # too large an image is one
        except _UNKNOWN:
            return False


_UNKNOWN = (OSError, EOFError, KeyError, IndexError, OverflowError, SyntaxError, ValueError)
"""What Pillow's readers raise on a file that only begins like an image."""
