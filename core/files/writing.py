"""Files that a reader never sees half of, and folders that one process writes to."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from triptych.core.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Writes beside, syncs, renames.

    Raises:
        UserError: the disk is full or the folder cannot be written; what was there stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write: {error.strerror}") from error


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Makes a folder this process's own while inside; the lock ends with the process, however.

    Raises:
        UserError: another process has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot write: {error.strerror}; give another folder") from error
    with lock:
        try:
            # Not flock: a worker process that outlives a kill would go on holding it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"{folder}: another process is training there") from error
        yield
