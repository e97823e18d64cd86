"""The user's folder for caches, and a lock for work that one process does for all."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from triptych.core.errors import UserError
from triptych.core.files.writing import UNSUPPORTED

VARIABLE = "TRIPTYCH_CACHE"
"""Environment variable that names another folder."""


def cache_folder() -> Path:
    """``TRIPTYCH_CACHE``, else ``triptych`` in the folder of the XDG base directories."""
    if own := os.environ.get(VARIABLE, ""):
        return Path(os.path.abspath(os.path.expanduser(own)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    return Path(home) / "triptych"


@contextmanager
def alone(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds a lock beside ``path`` while inside, so that one process or thread at a time makes it.

    A file system without locks is passed over: then two processes may do the work twice.

    Args:
        path: of a file that need not exist yet. Its folder is made.
        waiting: called once if another process holds the lock.

    Raises:
        UserError: the folder cannot be written.
    """
    name = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = name.open("w")
    except OSError as error:
        raise UserError(
            f"{error.filename or name}: cannot write: {error.strerror}; set {VARIABLE} to a folder "
            "that can be written"
        ) from error
    with lock:
        try:
            # Not lockf: its locks belong to the process, and two threads would both hold one.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                waiting()
                fcntl.flock(lock, fcntl.LOCK_EX)
            elif error.errno not in UNSUPPORTED:
                raise
        yield
