"""Computes beside the writing of a file: its hash, and checks of what is written."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triptych.core.files.writing import opened

AHEAD = 2**26
"""Bytes that may wait for a call."""

LEAST = 2**16
"""A call counts for as many bytes at least, since it takes some memory itself."""


class Beside:
    """One thread that makes calls in their order. hashlib, zlib and NumPy let it run meanwhile."""

    def __init__(self, pool: ThreadPoolExecutor, ahead: int) -> None:
        """``beside`` makes one."""
        self._pool, self._ahead = pool, ahead
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._size = 0

    def call(self, function: Callable[..., None], *arguments: Any, size: int = 0) -> None:
        """Has a function called. If calls on too many bytes wait, this waits for the first of them.

        Args:
            function: what is called.
            arguments: of the function.
            size: bytes of memory that the arguments keep.

        Raises:
            Exception: what an earlier call raised.
        """
        size = max(size, LEAST)
        self._waiting.append((self._pool.submit(function, *arguments), size))
        self._size += size
        while self._size > self._ahead and len(self._waiting) > 1:
            self._wait()

    def finish(self) -> None:
        """Waits for all calls; raises what one of them raised."""
        while self._waiting:
            self._wait()

    def _wait(self) -> None:
        future, size = self._waiting.popleft()
        self._size -= size
        future.result()


@contextmanager
def beside(ahead: int = AHEAD) -> Iterator[Beside]:
    """A thread for calls. Calls on ``ahead`` bytes may wait; an error inside drops them."""
    pool = ThreadPoolExecutor(1)
    try:
        yield Beside(pool, ahead)
    finally:
        pool.shutdown(cancel_futures=True)


class Hashed:
    """A file that is hashed in a thread beside the writing.

    Args:
        path: of the new file.
        thread: hashes what is written, and may still do so after ``close``.

    Attributes:
        size: bytes so far.
    """

    def __init__(self, path: Path, thread: Beside) -> None:
        self.size = 0
        self._file = opened(path)
        self._thread, self._digest = thread, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Writes bytes, whose memory must not be changed afterwards."""
        self._thread.call(self._digest.update, data, size=len(data))
        self.size += len(data)
        return self._file.write(data)

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def sha256(self) -> str:
        """The hexadecimal digest; waits for the thread."""
        self._thread.finish()
        return self._digest.hexdigest()
