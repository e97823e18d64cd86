"""Archives are those that Python's zipfile reads, large ones included, and have right checksums."""

import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from triptych.core.files import zips
from triptych.core.files.hashing import LEAST, beside
from triptych.core.files.zipping import ZipWriter, zip_writer


def test_zipfile_finds_every_member_and_checksum(tmp_path: Path):
    pieces = [np.full(1000, place, np.uint8).data for place in range(50)]
    with zip_writer(tmp_path / "x") as archive:
        archive.put("a/é", b"text")
        archive.begin("a/values", 50_000, 64)
        for piece in pieces:
            archive.write(piece)
        archive.put("none", b"")
    with zipfile.ZipFile(tmp_path / "x") as found:
        assert found.testzip() is None
        assert found.namelist() == ["a/é", "a/values", "none"]
        assert found.read("a/values") == b"".join(pieces)
    own = zips.Archive(zips.mapped(tmp_path / "x"))
    assert own.members["a/values"].start % 64 == 0
    assert own.members["a/é"].check == zlib.crc32(b"text")


def test_members_and_places_beyond_four_gibibytes(tmp_path: Path):
    size = 2**32 + 5
    with open(tmp_path / "x", "wb") as file, beside() as thread:
        archive = ZipWriter(file, thread)
        archive.begin("large", size)
        file.seek(size, 1)  # a hole, which takes no room on the disk
        archive.put("behind", b"abc")
        archive.finish()
    with zipfile.ZipFile(tmp_path / "x") as found:
        assert found.getinfo("large").file_size == size
        assert found.read("behind") == b"abc"
    members = zips.Archive(zips.mapped(tmp_path / "x")).members
    assert members["large"].size == size and members["behind"].start > size


def test_many_members(tmp_path: Path):
    with zip_writer(tmp_path / "x") as archive:
        for place in range(2**16):
            archive.put(str(place), b"")
    assert len(zips.Archive(zips.mapped(tmp_path / "x")).members) == 2**16
    with zipfile.ZipFile(tmp_path / "x") as found:
        assert len(found.namelist()) == 2**16


def test_an_error_beside_the_writing_ends_it():
    def fail() -> None:
        raise ValueError("beside")

    with pytest.raises(ValueError, match="beside"), beside(1) as thread:
        for _ in range(3):
            thread.call(fail)


def test_calls_wait_for_the_bytes_before_them():
    done: list[int] = []
    gate = threading.Event()

    def task(number: int) -> None:
        assert gate.wait(20)
        done.append(number)

    with beside(3 * LEAST) as thread:
        for number in range(3):
            thread.call(task, number)
        assert not done
        gate.set()
        thread.call(task, 3, size=2 * LEAST)
        assert done[:2] == [0, 1]
        thread.call(task, 4, size=9 * LEAST)  # larger than all that may wait: it waits alone
        assert done[:4] == [0, 1, 2, 3]
        thread.finish()
    assert done == [0, 1, 2, 3, 4]
