"""Atomic writing of files, and locking of folders."""

import errno
import fcntl
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from triptych.core.errors import UserError

Say = Callable[[str], None]

UNSUPPORTED = frozenset(
    {
        *(errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY),
        *(errno.EBADF, errno.EISDIR, errno.EPERM, errno.EACCES, errno.ENOLCK, errno.ENODEV),
        524,  # ENOTSUPP of Linux, which NFS lets slip through; Python has no name for it
    }
)
"""Error numbers of a file system that does not know an operation, such as a lock or the syncing of
a folder. SMB, NFS, Lustre, FUSE and shared folders of virtual machines answer with these."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a full disk, a used quota and a file at its largest size."""
PIECE = 2**20
"""Bytes that the operating system is given at once. It copies them through the caches of the CPU;
larger pieces take it twice as long."""


class _Pieces(io.FileIO):
    """A file that takes at most ``PIECE`` bytes at once; Python's buffer brings the rest again."""

    def write(self, data: Any, /) -> int:
        return super().write(memoryview(data)[:PIECE])


def opened(path: Path) -> io.BufferedWriter:
    """A new file for large writes."""
    return io.BufferedWriter(_Pieces(path, "w"))


def make_folder(folder: Path, told: str) -> None:
    """Makes a folder, and those above it, where they are missing.

    Args:
        told: the option and its value, for an error.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{told}: {error.strerror}; name another folder") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a temporary file beside ``path``, syncs it, and renames it to ``path``.

    Raises:
        UserError: the disk is full, the folder cannot be written, or ``path`` is a device; an
            earlier file stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            # The new file would take the place of the device.
            raise UserError(f"{path}: cannot write: not a file; name another one")
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise UserError(f"{path}: cannot write: {error.strerror}") from error


def sync(path: Path) -> bool:
    """Waits until the content of a file, or the names in a folder, are on the disk.

    Returns:
        False if the file system has no such operation. Then a power cut may lose the content.

    Raises:
        OSError: the disk is full or broken.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise OSError(error.errno, error.strerror, str(path)) from error
    return True


def set_mode(path: Path, mode: int) -> bool:
    """Sets access rights. Returns False if the file system has none."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def remedy(number: int | None) -> str:
    """The remedy for an error number of a file system that refuses to write."""
    if number in FULL:
        return "free some space, lower checkpoint.keep or set --output to another disk"
    return "make the folder writable or set --output to another one"


@contextmanager
def occupied(folder: Path, say: Say = print) -> Iterator[None]:
    """Locks a folder for this process while inside. The end of the process ends the lock, too.

    Args:
        say: called with a warning if the file system has no locks; the folder is not locked then.

    Raises:
        UserError: another process has locked the folder, or the folder cannot be made.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        where = error.filename or path
        raise UserError(
            f"{where}: cannot write: {error.strerror}; {remedy(error.errno)}"
        ) from error
    with lock:
        try:
            # Not flock: a worker process that outlives a kill would still hold the lock.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"{folder}: another process is training there; wait for its end or set "
                    "--output to another folder"
                ) from error
            if error.errno not in UNSUPPORTED:
                raise UserError(
                    f"{path}: cannot lock: {error.strerror}; set --output to another disk"
                ) from error
            say(
                f"warning: {folder}: the file system has no locks ({error.strerror}): take care "
                "that no second run writes there"
            )
        yield
