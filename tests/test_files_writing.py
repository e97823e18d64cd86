"""File systems that know no locks and no syncing, and those that are really broken."""

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from triptych.core.errors import UserError
from triptych.core.files import writing


def raising(number: int) -> Callable[..., None]:
    """A function of the operating system that fails with an error number."""

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


UNKNOWN = [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, 524]


@pytest.mark.parametrize("number", UNKNOWN)
def test_a_folder_without_locks_is_used_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "lockf", raising(number))
    said: list[str] = []
    with writing.occupied(tmp_path, said.append):
        pass
    (line,) = said
    assert line.startswith(f"warning: {tmp_path}: the file system has no locks")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EAGAIN, "another process is training there"),
        (errno.EACCES, "another process is training there"),
        (errno.EIO, r"\.lock: cannot lock: Input/output error"),
        (errno.ESTALE, r"\.lock: cannot lock: Stale"),
    ],
)
def test_a_lock_that_is_held_or_broken_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    monkeypatch.setattr(fcntl, "lockf", raising(number))
    with pytest.raises(UserError, match=message) as caught, writing.occupied(tmp_path):
        pass
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("number", UNKNOWN)
def test_what_cannot_be_synced_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    assert writing.sync(tmp_path)
    monkeypatch.setattr(os, "fsync", raising(number))
    assert not writing.sync(tmp_path)
    writing.write_atomically(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_broken_or_full_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", raising(number))
    with pytest.raises(OSError) as caught:
        writing.sync(tmp_path)
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path))
    (tmp_path / "file").write_text("before")
    with pytest.raises(UserError, match=f"file: cannot write: {os.strerror(number)}"):
        writing.write_atomically(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_access_rights_are_set_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.touch()
    assert writing.set_mode(path, 0o604)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    monkeypatch.setattr(Path, "chmod", raising(errno.EPERM))
    assert not writing.set_mode(path, 0o644)
    monkeypatch.setattr(Path, "chmod", raising(errno.EROFS))
    with pytest.raises(OSError, match="Read-only"):
        writing.set_mode(path, 0o644)


def test_large_writes_reach_the_file_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writing, "PIECE", 10_000)
    content = os.urandom(123_457)
    with writing.opened(tmp_path / "x") as file:
        assert file.write(content[:7]) == 7
        assert file.write(content[7:]) == len(content) - 7
    assert (tmp_path / "x").read_bytes() == content
