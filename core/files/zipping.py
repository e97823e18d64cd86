"""Writes zip archives of unpacked members. Checksums are computed beside the writing.

Python's own zipfile computes a checksum before it writes each piece, which takes half as long as
the writing. Sizes are known here before, so a member needs no more than its checksum filled in.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from triptych.core.files.checksum import crc32
from triptych.core.files.hashing import Beside, beside
from triptych.core.files.writing import opened

FULL, COUNTED = 2**32 - 1, 2**16 - 1
"""Values of the narrow fields whose number stands in a field of zip64."""
DATE = 1 << 5 | 1
"""The first day that an archive can name: archives of equal content are equal."""
ENCODED = 0x800
"""Flag of a name in UTF-8."""


@dataclass
class _Entry:
    """A member: its name, the start of its header, its size and its checksum, at first so far."""

    name: bytes
    start: int
    size: int
    check: int = 0
    known: bool = False

    def add(self, data: Any) -> None:
        self.check = crc32(data, self.check)

    @property
    def fields(self) -> bytes:
        """What local header and directory have in common, from the flags to the sizes."""
        size = min(self.size, FULL)
        flags = 0 if self.name.isascii() else ENCODED
        return struct.pack("<HHHHLLL", flags, 0, 0, DATE, self.check, size, size)

    @property
    def version(self) -> int:
        """Of the archives' format that a reader has to know: 4.5 for zip64."""
        return 45 if max(self.size, self.start) >= FULL else 20


class ZipWriter:
    """An archive that is being written; bytes go to the member that was begun last."""

    def __init__(self, file: IO[bytes], thread: Beside) -> None:
        """``zip_writer`` makes one."""
        self._file, self._thread = file, thread
        self._entries: list[_Entry] = []

    def begin(self, name: str, size: int, alignment: int = 1, checksum: int | None = None) -> None:
        """Begins a member.

        Args:
            name: of the member.
            size: number of bytes that will be written.
            alignment: the bytes begin at a multiple of this.
            checksum: CRC-32 of the bytes; None: it is computed.
        """
        known = checksum is not None
        entry = _Entry(name.encode(), self._file.tell(), size, checksum or 0, known)
        self._entries.append(entry)
        wide = struct.pack("<HHQQ", 1, 16, size, size) if size >= FULL else b""
        length = -(entry.start + 30 + len(entry.name) + len(wide) + 4) % alignment
        filling = struct.pack("<2sH", b"FB", length) + bytes(length)
        extra = wide + (filling if alignment > 1 else b"")
        head = b"PK\x03\x04" + struct.pack("<H", entry.version) + entry.fields
        self._file.write(head + struct.pack("<HH", len(entry.name), len(extra)))
        self._file.write(entry.name + extra)

    def write(self, data: Any) -> int:
        """Writes bytes of a member, whose memory must not be changed afterwards."""
        if not self._entries[-1].known:
            self._thread.call(self._entries[-1].add, data, size=len(data))
        return self._file.write(data)

    def put(self, name: str, content: bytes) -> None:
        """Writes a whole member."""
        self.begin(name, len(content))
        self.write(content)

    def finish(self) -> None:
        """Writes the directory, and the checksums into the headers."""
        self._thread.finish()
        start = self._file.tell()
        for entry in self._entries:
            self._file.write(_directory_entry(entry))
        self._file.write(_end(start, self._file.tell(), len(self._entries)))
        self._file.flush()
        for entry in self._entries:
            os.pwrite(self._file.fileno(), struct.pack("<L", entry.check), entry.start + 14)


def _directory_entry(entry: _Entry) -> bytes:
    wide = [entry.size] * 2 if entry.size >= FULL else []
    wide += [entry.start] if entry.start >= FULL else []
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    versions = struct.pack("<HH", entry.version, entry.version)
    lengths = struct.pack("<HHHHH", len(entry.name), len(extra), 0, 0, 0)
    place = struct.pack("<LL", 0o600 << 16, min(entry.start, FULL))
    return b"PK\x01\x02" + versions + entry.fields + lengths + place + entry.name + extra


def _end(start: int, end: int, count: int) -> bytes:
    """The end of the directory from ``start`` to ``end``."""
    size = end - start
    wide = b""
    if start >= FULL or size >= FULL or count >= COUNTED:
        fields = struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
        wide = b"PK\x06\x06" + fields + b"PK\x06\x07" + struct.pack("<LQL", 0, end, 1)
    counts = [min(count, COUNTED)] * 2
    last = struct.pack("<HHHHLLH", 0, 0, *counts, min(size, FULL), min(start, FULL), 0)
    return wide + b"PK\x05\x06" + last


@contextmanager
def zip_writer(path: Path) -> Iterator[ZipWriter]:
    """An archive to write, which is whole after the block."""
    with opened(path) as file, beside() as thread:
        archive = ZipWriter(file, thread)
        yield archive
        archive.finish()
