"""Reads WebDataset tars at any place: the offsets of all images are found once and remembered.

The members of a sample follow each other, and their names are equal up to the first dot of the file
name. The first member whose ending is an image's is the image. The label is in ``.cls`` (a number
or a name), or the value ``label`` of ``.json``.

The ``webdataset`` library reads such tars as a stream, in the order in which they lie on the disk.
Here the order of a run is a pure function of its step, so any image is read at any time.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core.contracts import State
from triptych.core.data.archives import shards
from triptych.core.data.classes import label_classes
from triptych.core.data.decode import DamagedImage, Decoding, decode_bytes
from triptych.core.data.index import Index, Memory, Witness, buffers, strings, witness
from triptych.core.data.scan import ENDINGS, Progress
from triptych.core.data.source import UNLABELLED, Labelled, Names, local_name
from triptych.core.errors import UserError, printable

RULES = "webdataset 1"
"""Changes when the same tars are read in another way."""
MAX_LABEL = 2**20
"""Most bytes of a member that holds a label."""
LABELS = ("cls", "cls.txt", "json")
"""Endings of members with a label."""


class Member(NamedTuple):
    """One file in a tar.

    Attributes:
        key: its name up to the first dot of the file name.
        ending: the rest, in lower case, without the dot.
    """

    name: str
    key: str
    ending: str
    offset: int
    size: int


class Places(NamedTuple):
    """Where the images of some tars are.

    Attributes:
        names: of the members, N.
        shard: (N,) number of the tar.
        offset: (N,) place of the first byte in the tar.
        size: (N,) bytes.
        label: (N,) position in ``classes``, or -1.
        others: counts of what was passed over, in one line.
    """

    names: Names
    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int64]
    classes: tuple[str, ...]
    others: str


COLUMNS = ("shard", "offset", "size", "label")


class Tars(Labelled):
    """The images of some tars; see ``Source``."""

    def __init__(
        self, paths: Sequence[str], places: Places, notes: Sequence[str], how: Decoding
    ) -> None:
        """Images in the order of the tars."""
        super().__init__(places.label if places.classes else None, places.classes, notes)
        self._paths, self._places, self._how = tuple(paths), places, how

    def __len__(self) -> int:
        """How many images."""
        return len(self._places.names)

    def image(self, index: int) -> Image.Image:
        """See ``Source``."""
        size, name = int(self._places.size[index]), self.name(index)
        try:
            with open(self._path(index), "rb") as file:
                file.seek(int(self._places.offset[index]))
                content = file.read(size)
        except OSError as error:
            raise DamagedImage(f"{printable(name)}: {error.strerror}") from error
        if len(content) < size:
            raise DamagedImage(f"{printable(name)}: the tar is shorter than at the start")
        return decode_bytes(content, name, self._how)

    def name(self, index: int) -> str:
        """The tar's path and the member's name."""
        return os.path.join(self._path(index), self._places.names[index])

    def key(self, index: int) -> str:
        """The tar's name and the member's name."""
        return os.path.join(os.path.basename(self._path(index)), self._places.names[index])

    def _path(self, index: int) -> str:
        return self._paths[int(self._places.shard[index])]


def tars(root: str, how: Decoding, key: str, memory: Memory | None = None) -> Tars:
    """The images of the tars that ``root`` names.

    Args:
        root: a folder of tars, a pattern, or one tar.
        key: the spec's key that gives ``root``, for messages.
        memory: where the places of the images are remembered; None: nowhere.

    Raises:
        UserError: there are no tars or no images in them, or one is damaged or packed.
    """
    paths = shards(root, ".tar", key)
    rules = f"{RULES} {len(paths)} {sorted(ENDINGS)}"
    index = None if memory is None else memory.index(root, rules)
    places = (index and index.load(_unpacked)) or _unpacked(*_found(paths, key, index))
    if not len(places.names):
        raise UserError(f"{key}: {printable(root)}: no images in {len(paths)} tars")
    others = places.others
    notes = [f"{key}: {printable(root)}: passed over: {others}"] if others else []
    return Tars(paths, places, notes, how)


def _unpacked(header: dict[str, str], arrays: State) -> Places:
    names, classes = strings(arrays, "names"), tuple(strings(arrays, "classes"))
    shard, offset, size, label = columns = [arrays[name] for name in COLUMNS]
    if any(column.shape != (len(names),) for column in columns):
        raise ValueError("other numbers of offsets than of names")
    return Places(names, shard, offset, size, label, classes, header["others"])


@dataclass
class _Content:
    """What is in some tars; the rows of the images."""

    names: list[str] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def _found(paths: Sequence[str], key: str, index: Index | None) -> tuple[dict[str, str], State]:
    """Header and arrays for an index, which is written where there is one."""
    found, witnesses = _Content(), list[Witness]()
    progress = None if index is None else Progress(f"{key}: {printable(index.subject)}", index.say)
    for number, path in enumerate(paths):
        at = f"{key}: {printable(path)}"
        try:
            witnesses.append(witness(path))
            _add(found, number, path, progress)
        except OSError as error:
            raise UserError(f"{at}: {error.strerror or error}") from error
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"{at}: {_reason(path, error)}") from error
    classes = label_classes(found.labels)
    numbers = {"": UNLABELLED, **{name: number for number, name in enumerate(classes)}}
    columns = np.array(found.rows, np.int64).reshape(-1, 3).T
    arrays = dict(zip(COLUMNS, columns, strict=False))
    arrays["label"] = np.array([numbers[label] for label in found.labels], np.int64)
    arrays |= buffers("names", found.names) | buffers("classes", classes)
    others = ", ".join(f"{count} .{kind}" for kind, count in found.others.most_common(8))
    if index is not None:
        index.save({"others": others}, dict(arrays), witnesses, len(found.names))
    return {"others": others}, arrays


def _add(found: _Content, number: int, path: str, progress: Progress | None) -> None:
    """Adds the samples of one tar."""
    with open(path, "rb") as file:
        for _, group in groupby(_members(path), key=attrgetter("key")):
            members = list(group)
            image = next((one for one in members if f".{one.ending}" in ENDINGS), None)
            if image is None:
                found.others.update(member.ending or "(no ending)" for member in members)
                continue
            if progress is not None:
                progress(len(found.names))
            found.names.append(image.name)
            found.rows.append((number, image.offset, image.size))
            found.labels.append(_label(file, members))


def _members(path: str) -> Iterator[Member]:
    """The files in a tar, in their order; nothing is unpacked.

    Raises:
        ValueError: members overlap, or reach beyond the end of the tar.
        tarfile.TarError: not a tar, or cut short.
    """
    last, end = -1, os.path.getsize(path)
    with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
        for entry in tar:
            # Else the memory grows with every member. The type stubs lack the list.
            tar.members.clear()  # type: ignore[attr-defined]
            if entry.offset <= last or not 0 <= entry.size <= end - entry.offset_data:
                raise ValueError(f"the size of {printable(entry.name)} cannot be true")
            last = entry.offset
            if not entry.isreg() or entry.issparse():
                continue
            folder, slash, name = entry.name.rpartition("/")
            stem, _, ending = name.partition(".")
            if stem:
                key, name = f"{folder}{slash}{stem}", local_name(entry.name)
                yield Member(name, key, ending.lower(), entry.offset_data, entry.size)


def _label(file: IO[bytes], members: Sequence[Member]) -> str:
    """The label of a sample; "" if there is none.

    Raises:
        ValueError: a member for labels holds something else.
    """
    for ending in LABELS:
        for member in members:
            if member.ending != ending:
                continue
            if member.size > MAX_LABEL:
                raise ValueError(f"{printable(member.name)}: {member.size} bytes are no label")
            file.seek(member.offset)
            try:
                text = file.read(member.size).decode()
                value = json.loads(text).get("label", "") if ending == "json" else text
            except (ValueError, AttributeError, RecursionError) as error:
                raise ValueError(f"{printable(member.name)}: no label ({error})") from error
            return str(value).strip()
    return ""


def _reason(path: str, error: Exception) -> str:
    with open(path, "rb") as file:
        head = file.read(2)
    if head in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
        return "a packed tar cannot be read at any place; unpack it to a plain .tar"
    return f"not a whole tar file ({error}); make or download it again"
