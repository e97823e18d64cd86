"""Remembers what was found in folders and tars, in a file that is checked against them.

An index file is an npz archive without pickles: numbers, strings in one buffer, and a header in
JSON. It is valid while all witnesses, the folders and files that were read, have the times and the
size that they had.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from triptych.core.contracts import State
from triptych.core.data.source import Names, native_path, packed
from triptych.core.errors import UserError, printable
from triptych.core.files.arrays import read_npz
from triptych.core.files.caching import cache_folder
from triptych.core.files.writing import Say, sync

T = TypeVar("T")

FORMAT = 1
FEWEST = 10_000
"""Fewest images that are remembered; fewer are found again within a second."""
SETTLED = 2 * 10**9
"""Nanoseconds for which nothing may have changed. A later change could keep the same times, since
some file systems count whole seconds."""


class Witness(NamedTuple):
    """A folder or file that was read, and its state before.

    Attributes:
        stamp: time of the last change of the content and of the entry (nanoseconds), and the size.
    """

    path: str
    stamp: tuple[int, int, int]


def stamp(status: os.stat_result) -> tuple[int, int, int]:
    """What a change of a folder or file changes; see ``Witness``."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size


def witness(path: str) -> Witness:
    """The present state of a folder or file.

    Raises:
        OSError: it cannot be read.
    """
    return Witness(path, stamp(os.stat(path)))


@dataclass(frozen=True)
class Index:
    """The index file of one thing.

    Attributes:
        path: of the index file.
        subject: the path of the folder, or the pattern of the tars, made absolute.
        rules: what else the content depends on, e.g. which endings are images.
        say: gets a line when the index is written, or cannot be.
    """

    path: Path
    subject: str
    rules: str
    say: Say

    def load(self, unpack: Callable[[dict[str, Any], State], T]) -> T | None:
        """The remembered content; None if there is none, or if it does not hold any more.

        Args:
            unpack: makes the content of header and arrays; raises ValueError, LookupError or
                TypeError if they do not fit.
        """
        try:
            arrays = read_npz(self.path)
            header = json.loads(arrays.pop("header").tobytes())
            same = header["format"] == FORMAT and header["rules"] == self.rules
            if not same or header["subject"] != os.fsencode(self.subject).hex():
                return None
            paths = strings(arrays, "witnesses")
            stamps = arrays.pop("stamps")
            if len(stamps) != len(paths):
                return None
            for path, stamp in zip(paths, stamps.tolist(), strict=True):
                if witness(path).stamp != tuple(stamp):
                    return None
            return unpack(dict(header["content"]), arrays)
        except (UserError, OSError, ValueError, LookupError, TypeError):
            return None  # no index, a damaged one, or a folder that is gone: found again

    def save(
        self, content: dict[str, Any], arrays: State, witnesses: Sequence[Witness], count: int
    ) -> None:
        """Writes the index file, whole or not at all.

        Nothing is written for few images, and for folders that have just changed.

        Args:
            content: values for the header.
            count: number of images.
        """
        newest = max(max(entry.stamp[:2]) for entry in witnesses)
        oldest = min(entry.stamp[0] for entry in witnesses)
        # A file system without times could not show a change.
        if count < FEWEST or oldest <= 0 or newest > time.time_ns() - SETTLED:
            return
        header = {
            "format": FORMAT,
            "rules": self.rules,
            "subject": os.fsencode(self.subject).hex(),
            "content": content,
        }
        stored = {
            **arrays,
            **buffers("witnesses", [entry.path for entry in witnesses]),
            "stamps": np.array([entry.stamp for entry in witnesses], np.int64),
            "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        }
        # Several machines may share the folder.
        writer = f"{os.uname().nodename}-{os.getpid()}"
        aside = self.path.with_name(f".{self.path.stem}.{writer}.npz")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(aside, **stored)
            sync(aside)
            os.replace(aside, self.path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            where = printable(str(self.path))
            self.say(
                f"data.index: {where}: cannot write: {error.strerror}; the next run looks for all "
                "images again; set data.index to another folder, or to null"
            )
        else:
            self.say(f"data.index: {count} images remembered in {printable(str(self.path))}")


@dataclass(frozen=True)
class Memory:
    """Where the content of folders and tars is remembered.

    Attributes:
        folder: of the index files; "auto": ``triptych`` in the user's folder for caches.
        say: gets lines about work that takes long, and about index files.
    """

    folder: str
    say: Say

    def index(self, subject: str, rules: str) -> Index:
        """The index file for a folder, or for a pattern of tars.

        Args:
            rules: what the content depends on beside the files.
        """
        absolute = os.path.abspath(subject)
        digest = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]
        place = cache_folder() if self.folder == "auto" else Path(native_path(self.folder))
        return Index(place / f"index-{digest}.npz", absolute, rules, self.say)


def buffers(name: str, texts: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Strings as two arrays for an index file; ``strings`` makes them strings again."""
    names = packed(texts)
    content = np.frombuffer(names.content, np.uint8)
    return {name: content, f"{name}.ends": names.ends}


def strings(arrays: State, name: str) -> Names:
    """The strings that ``buffers`` made arrays of; takes these out of ``arrays``.

    Raises:
        ValueError: the ends of the strings do not fit the buffer.
        KeyError: they are not there.
    """
    content, ends = arrays.pop(name), arrays.pop(f"{name}.ends")
    if ends.dtype != np.int64 or ends.ndim != 1 or not len(ends) or ends[0] != 0:
        raise ValueError("no ends of strings")
    if ends[-1] != content.size or (np.diff(ends) < 0).any():
        raise ValueError("ends of strings beyond their buffer")
    return Names(content.tobytes(), ends)
