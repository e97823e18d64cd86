"""Hashes a file while it is written."""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AHEAD = 8
"""Number of pieces that may wait for the hash."""


class Hashed:
    """A file that is hashed in a thread beside the writing.

    Attributes:
        size: bytes so far.
        sha256: hexadecimal digest, at the end.
    """

    def __init__(self, path: Path, pool: ThreadPoolExecutor) -> None:
        """A new file. ``hashed`` makes one."""
        self.size, self.sha256 = 0, ""
        self._file = open(path, "wb")
        self._pool, self._digest = pool, hashlib.sha256()
        self._waiting: deque[Future[None]] = deque()

    def write(self, data: Any) -> int:
        """Writes bytes, whose memory must not be changed afterwards."""
        self._waiting.append(self._pool.submit(self._digest.update, data))
        if len(self._waiting) > AHEAD:
            self._waiting.popleft().result()
        self.size += len(data)
        return self._file.write(data)

    def close(self) -> None:
        """Ends the file and the hash."""
        self._file.close()
        for future in self._waiting:
            future.result()
        self.sha256 = self._digest.hexdigest()


@contextmanager
def hashed(path: Path) -> Iterator[Hashed]:
    """A file to write. Its size and hash are known after the block."""
    with ThreadPoolExecutor(1) as pool:
        file = Hashed(path, pool)
        try:
            yield file
        finally:
            file.close()
