"""Reads zip archives from a mapped file: what is stored unpacked is a view, not a copy.

Python's own zipfile trusts the archive's sizes and counts, so that a small file can take a lot of
memory; this reader knows only what checkpoints use, and checks all that an archive states.
"""

import mmap
import stat
import struct
import weakref
import zlib
from pathlib import Path
from typing import NamedTuple

from triptych.core.files.checksum import crc32
from triptych.core.files.tree import Damaged, Malformed

MAX_MEMBERS = 200_000
"""Members of an archive; a training state of ViT-L has 1300."""

SLACK = 100 * 2**20
"""Bytes that all packed members together may unpack to, beyond the size of the archive."""

STORED, DEFLATED = 0, 8

_MAPPINGS: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()
"""The mapped files in use."""


class Member(NamedTuple):
    """One file of an archive.

    Attributes:
        method: ``STORED`` or ``DEFLATED``.
        check: CRC-32 of the unpacked bytes.
        start: where its packed bytes begin.
        packed: number of packed bytes.
        size: number of unpacked bytes.
    """

    method: int
    check: int
    start: int
    packed: int
    size: int


class Archive:
    """An open archive.

    Attributes:
        members: name -> place.
    """

    def __init__(self, data: memoryview) -> None:
        """The archive in ``data``.

        Raises:
            Malformed: it is damaged, or uses what no checkpoint needs.
        """
        self._data = data
        self._room = len(data) + SLACK
        start, size, count = _directory(data)
        if count > MAX_MEMBERS:
            raise Damaged(f"an archive of {count} members; at most {MAX_MEMBERS} are read")
        self.members = _members(data, start, size, count)

    def read(self, name: str) -> memoryview:
        """The bytes of a member: a view where they are stored unpacked.

        Raises:
            Malformed: the member is missing or damaged, or unpacks to more than the limit.
        """
        if name not in self.members:
            raise Malformed(f"{name!r} is missing in the archive: fetch the file again")
        member = self.members[name]
        raw = self._data[member.start : member.start + member.packed]
        if member.method == STORED:
            return raw
        self._room -= member.size
        if self._room < 0:
            raise Malformed(f"{name!r} unpacks to {member.size} bytes: refused as a zip bomb")
        try:
            unpacked = zlib.decompressobj(-15).decompress(raw, member.size + 1)
        except zlib.error as error:
            raise Damaged(f"{name!r} is damaged: {error}") from error
        if len(unpacked) != member.size or crc32(unpacked) != member.check:
            raise Malformed(f"{name!r} is damaged: fetch the file again")
        return memoryview(unpacked)

    def checked(self, name: str) -> memoryview:
        """As ``read``, and compared with its checksum, which reads all of it.

        Raises:
            Malformed: as in ``read``, or the checksum differs.
        """
        content = self.read(name)
        self.verify(name, content)
        return content

    def verify(self, name: str, content: memoryview) -> None:
        """Compares what was read of a member with its checksum.

        Raises:
            Malformed: they differ.
        """
        # torch.serialization.set_crc32_options(False) leaves the checksums at 0.
        check = self.members[name].check
        if check and crc32(content) != check:
            raise Malformed(f"{name!r} is damaged (its checksum differs): fetch the file again")


def mapped(path: Path) -> memoryview:
    """The bytes of a file, read when they are used. The file must not be changed meanwhile.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as stream:
        if not stream.seek(0, 2):
            return memoryview(b"")
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    _MAPPINGS.add(mapping)
    return memoryview(mapping)


def release() -> None:
    """Gives back the memory of all mapped files. Values are read from the file once more."""
    for mapping in _MAPPINGS:
        mapping.madvise(mmap.MADV_DONTNEED)


def _directory(data: memoryview) -> tuple[int, int, int]:
    """Start and size of the central directory, and the number of members."""
    tail_start = max(0, len(data) - 65_557)
    place = bytes(data[tail_start:]).rfind(b"PK\x05\x06")
    end = tail_start + place
    if place < 0 or end + 22 > len(data):
        raise Damaged("cut short, or no zip archive: its directory is missing")
    disk, first, here, count, size, start, comment = struct.unpack_from("<4H2LH", data, end + 4)
    if end + 22 + comment != len(data):
        raise Damaged("a zip archive with bytes behind its end")
    if end >= 20 and bytes(data[end - 20 : end - 16]) == b"PK\x06\x07":
        disk, place, _ = struct.unpack_from("<LQL", data, end - 16)
        if place + 56 > end - 20 or bytes(data[place : place + 4]) != b"PK\x06\x06":
            raise Damaged("a zip archive with a false directory")
        first, here, count, size, start = struct.unpack_from("<L4Q", data, place + 20)
        end = place
    if disk or first or here != count or start + size != end:
        raise Damaged("a zip archive with a false directory, or one in several parts")
    return start, size, count


def _members(data: memoryview, start: int, size: int, count: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    position, end = start, start + size
    for _ in range(count):
        if position + 46 > end or bytes(data[position : position + 4]) != b"PK\x01\x02":
            raise Damaged("a zip archive with a damaged directory")
        fields = struct.unpack_from("<6H3L5H2L", data, position + 4)
        lengths = fields[9:12]
        name_end = position + 46 + lengths[0]
        following = name_end + lengths[1] + lengths[2]
        if following > end:
            raise Damaged("a zip archive with a damaged directory")
        raw_name = bytes(data[position + 46 : name_end])
        name = _name(raw_name, fields[2], fields[14] >> 16)
        if name in members:
            raise Damaged(f"a zip archive that holds {name!r} twice")
        packed, unpacked, offset = _sizes(data[name_end : name_end + lengths[1]], fields)
        content = _content(data, offset, raw_name)
        members[name] = Member(fields[3], fields[6], content, packed, unpacked)
        position = following
    if position != end:
        raise Damaged("a zip archive with a damaged directory")
    _check(members, start)
    return members


def _name(raw: bytes, flags: int, mode: int) -> str:
    """The name of a member, which must be a plain file inside the archive's folder."""
    try:
        name = raw.decode("utf-8" if flags & 0x800 else "ascii")
    except UnicodeDecodeError as error:
        raise Damaged(f"a zip archive with the name {raw[:60]!r}") from error
    parts = name.split("/")
    if ".." in parts or "" in parts[:-1] or "\\" in name or "\0" in name or name[1:2] == ":":
        raise Damaged(f"a zip archive with the name {name[:100]!r}, outside of its folder")
    if stat.S_ISLNK(mode):
        raise Damaged(f"a zip archive with the symbolic link {name[:100]!r}")
    if flags & 0x2041:
        raise Damaged(f"a zip archive with the encrypted member {name[:100]!r}")
    return name


def _sizes(extra: memoryview, fields: tuple[int, ...]) -> tuple[int, int, int]:
    """Packed and unpacked size and place of the local header, of zip or of zip64."""
    packed, unpacked, offset = fields[7], fields[8], fields[15]
    wide = b""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = bytes(extra[4 : 4 + length])
        extra = extra[4 + length :]
    numbers = list(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
    if 2**32 - 1 in (packed, unpacked, offset) and not numbers:
        raise Damaged("a zip archive with a damaged directory")
    # The wide numbers stand in this order, each only where its narrow form is full.
    unpacked = numbers.pop(0) if unpacked == 2**32 - 1 and numbers else unpacked
    packed = numbers.pop(0) if packed == 2**32 - 1 and numbers else packed
    offset = numbers.pop(0) if offset == 2**32 - 1 and numbers else offset
    return packed, unpacked, offset


def _content(data: memoryview, offset: int, name: bytes) -> int:
    """Where the bytes of a member begin, behind its local header."""
    if offset + 30 > len(data) or bytes(data[offset : offset + 4]) != b"PK\x03\x04":
        raise Damaged(f"a zip archive with a false place for {name[:60]!r}")
    length, extra = struct.unpack_from("<2H", data, offset + 26)
    if bytes(data[offset + 30 : offset + 30 + length]) != name:
        raise Damaged(f"a zip archive with two names for {name[:60]!r}")
    return int(offset + 30 + length + extra)


def _check(members: dict[str, Member], end: int) -> None:
    """Raises Malformed for members that overlap, reach too far or are packed otherwise."""
    position = 0
    for name, member in sorted(members.items(), key=lambda item: item[1].start):
        if member.method not in (STORED, DEFLATED):
            raise Malformed(f"{name!r} is packed by method {member.method}: pack it again")
        stored = member.method == STORED
        if member.start < position or (stored and member.packed != member.size):
            raise Damaged(f"a zip archive with false sizes or overlaps ({name!r})")
        position = member.start + member.packed
        if position > end:
            raise Malformed(f"{name!r} reaches beyond the archive: fetch the file again")
