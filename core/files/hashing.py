"""Computes beside the writing of a file: its hash, and checks of what is written."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AHEAD = 8
"""Number of pieces that may wait for the hash."""


class Beside:
    """One thread that makes calls in their order. hashlib, zlib and NumPy let it run meanwhile."""

    def __init__(self, pool: ThreadPoolExecutor, ahead: int) -> None:
        """``beside`` makes one."""
        self._pool, self._ahead = pool, ahead
        self._waiting: deque[Future[None]] = deque()

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Has a function called. If too many calls wait, this waits for the first.

        Raises:
            Exception: what an earlier call raised.
        """
        self._waiting.append(self._pool.submit(function, *arguments))
        if len(self._waiting) > self._ahead:
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Waits for all calls; raises what one of them raised."""
        while self._waiting:
            self._waiting.popleft().result()


@contextmanager
def beside(ahead: int = AHEAD) -> Iterator[Beside]:
    """A thread for calls, of which ``ahead`` may wait. An error inside drops those that wait."""
    pool = ThreadPoolExecutor(1)
    try:
        yield Beside(pool, ahead)
    finally:
        pool.shutdown(cancel_futures=True)


class Hashed:
    """A file that is hashed in a thread beside the writing.

    Attributes:
        size: bytes so far.
        sha256: hexadecimal digest, at the end.
    """

    def __init__(self, path: Path, thread: Beside) -> None:
        """A new file. ``hashed`` makes one."""
        self.size, self.sha256 = 0, ""
        self._file = open(path, "wb")
        self._thread, self._digest = thread, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Writes bytes, whose memory must not be changed afterwards."""
        self._thread.call(self._digest.update, data)
        self.size += len(data)
        return self._file.write(data)

    def close(self) -> None:
        """Ends the file and the hash."""
        self._file.close()
        self._thread.finish()
        self.sha256 = self._digest.hexdigest()


@contextmanager
def hashed(path: Path) -> Iterator[Hashed]:
    """A file to write. Its size and hash are known after the block."""
    with beside() as thread:
        file = Hashed(path, thread)
        try:
            yield file
        finally:
            file.close()
