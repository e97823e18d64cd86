"""Sources of images: arrays in memory, and files on disk."""

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from copy import copy
from functools import lru_cache
from typing import Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core.data.decode import Decoding, decode, to_mode

UNLABELLED = -1
L = TypeVar("L", bound="Labelled")


def local_name(text: str) -> str:
    """Converts text read as UTF-8 to the locale's form of a file name with the same bytes."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def native_path(text: str) -> str:
    """A spec's path in the form of this system. Expands ``~`` to the home folder.

    A spec is UTF-8. A path that the locale cannot encode names the file with the UTF-8 bytes.
    """
    path = os.path.expanduser(text)
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return local_name(path)
    return path


class Source(Protocol):
    """Images numbered from 0. A source can be pickled, since worker processes get a copy."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels; empty if there are none."""

    def __len__(self) -> int:
        """How many images."""

    def __hash__(self) -> int:
        """Hash of the object, since the content of a source does not change."""

    def image(self, index: int) -> Image.Image:
        """One image at its own size, 8-bit, in the mode that ``data.channels`` asks for.

        Raises:
            DamagedImage: the image cannot be read.
        """

    def label(self, index: int) -> int:
        """Position in ``classes``, or -1."""

    def name(self, index: int) -> str:
        """Name for messages: the path of the file, or e.g. ``digits[17]``."""

    def key(self, index: int) -> str:
        """A name that does not depend on the location of the data."""


def split_digest(source: Source, without: Collection[str] = ()) -> str:
    """SHA-256 of the names of a split's images, in order, and their labels; hexadecimal.

    Args:
        without: names of images to leave out, e.g. of damaged files.
    """
    return _digest(source, frozenset(without))


@lru_cache(maxsize=2)
def _digest(source: Source, without: frozenset[str]) -> str:
    """The digest, cached: the training split is also the labelled half of every evaluation."""
    kept = (i for i in range(len(source)) if not without or source.name(i) not in without)
    return content_digest(source.classes, ((source.key(i), source.label(i)) for i in kept))


def content_digest(classes: Sequence[str], images: Iterable[tuple[str, int]]) -> str:
    """SHA-256 of (key, label) pairs, hexadecimal; see ``Source``."""
    # Names as the bytes of the file system, which are the same in every locale.
    digest = hashlib.sha256(os.fsencode("\n".join(classes)))
    for key, label in images:
        digest.update(os.fsencode(f"\0{key}\0{label}"))
    return digest.hexdigest()


class Arrays:
    """Images in memory.

    Attributes:
        pixels: (N, H, W) grey or (N, H, W, 3) RGB, uint8.
        labels: (N,) positions in ``classes``.
    """

    def __init__(
        self,
        title: str,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64],
        classes: tuple[str, ...],
        how: Decoding,
        numbers: NDArray[np.int64] | None = None,
    ) -> None:
        """Images of the data set ``title``.

        Args:
            numbers: (N,) number of each image in the whole data set; None: 0, 1, …
        """
        self.pixels, self.labels, self.classes = pixels, labels, classes
        self._title, self._how = title, how
        self._numbers = np.arange(len(pixels)) if numbers is None else numbers

    def __len__(self) -> int:
        """How many images."""
        return len(self.pixels)

    def image(self, index: int) -> Image.Image:
        """See ``Source``; never damaged."""
        return to_mode(Image.fromarray(self.pixels[index]), self._how)

    def label(self, index: int) -> int:
        """See ``Source``."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """``title[number]``."""
        return f"{self._title}[{self._numbers[index]}]"

    key = name


class Labelled:
    """The labels of a source, and lines about it for the user.

    Attributes:
        classes: names of the labels; empty if there are none.
        notes: lines about the files, printed at the start of a run.
    """

    def __init__(
        self,
        labels: Sequence[int] | NDArray[np.int64] | None = None,
        classes: tuple[str, ...] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """Labels are positions in ``classes``; None: no image has a label."""
        self.classes, self.notes = classes, notes
        self._labels = None if labels is None else np.asarray(labels, np.int64)

    def label(self, index: int) -> int:
        """See ``Source``."""
        return UNLABELLED if self._labels is None else int(self._labels[index])

    def relabelled(self: L, classes: tuple[str, ...], notes: Sequence[str] = ()) -> L:
        """The same images with labels in other ``classes``, which contain all of the present ones.

        Args:
            notes: lines to add.
        """
        places = {name: number for number, name in enumerate(classes)}
        other = copy(self)
        other.classes, other.notes = classes, [*self.notes, *notes]
        if self._labels is not None:
            # The last one serves images without a label, whose number is -1.
            numbers = [*(places[name] for name in self.classes), UNLABELLED]
            other._labels = np.array(numbers, np.int64)[self._labels]
        return other


class Files(Labelled):
    """One image per file, which is read when it is needed."""

    def __init__(
        self,
        root: str,
        names: Sequence[str],
        how: Decoding,
        labels: Sequence[int] | NDArray[np.int64] | None = None,
        classes: tuple[str, ...] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """The files of a folder or a list.

        Args:
            names: paths, absolute or relative to ``root``.
            labels: positions in ``classes``.
            notes: lines about the files for the user, printed at the start of a run.
        """
        super().__init__(labels, classes, notes)
        self.root = root
        self._names, self._how = packed(names), how

    def __len__(self) -> int:
        """How many images."""
        return len(self._names)

    def image(self, index: int) -> Image.Image:
        """See ``Source``."""
        return decode(self.name(index), self._how)

    def name(self, index: int) -> str:
        """The path of the file."""
        return os.path.join(self.root, self._names[index])

    def key(self, index: int) -> str:
        """The path inside ``root``."""
        return self._names[index]


class Names(Sequence[str]):
    """Strings in one buffer. A million paths as objects would cost each worker 100 MB.

    Attributes:
        content: the bytes of all strings, one after the other.
        ends: (N + 1,) int64, where each string ends, after a 0.
    """

    def __init__(self, content: bytes, ends: NDArray[np.int64]) -> None:
        self.content, self.ends = content, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return os.fsdecode(self.content[self.ends[index] : self.ends[index + 1]])


def packed(names: Sequence[str]) -> Names:
    """The names of files in one buffer."""
    if isinstance(names, Names):
        return names
    encoded = [os.fsencode(name) for name in names]
    return Names(b"".join(encoded), np.cumsum([0, *map(len, encoded)]))
