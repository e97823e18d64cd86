"""Throughput of a run: time spent training, images per second, share of time waiting for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Measures steps against time. The time of evaluations and saves does not count.

    Attributes:
        seconds: training time so far, including the processes before a resume.
    """

    def __init__(self, batch_size: int, seconds: float = 0.0) -> None:
        self.batch_size, self.seconds = batch_size, seconds
        self._steps = 0
        self._waited = 0.0
        self._since = time.perf_counter()
        self._lap = 0.0
        """Seconds of training in the current lap that are already counted."""

    def count(self) -> None:
        """Counts one more step."""
        self._steps += 1

    def lap(self, waited: float) -> tuple[float, float]:
        """Images per second and the share of time spent waiting for data since the last call.

        Args:
            waited: seconds spent waiting in this process so far.
        """
        self._advance()
        elapsed = max(self._lap, 1e-9)
        rates = self._steps * self.batch_size / elapsed, min((waited - self._waited) / elapsed, 1.0)
        self._steps, self._waited, self._lap = 0, waited, 0.0
        return rates

    @contextmanager
    def pause(self) -> Iterator[None]:
        """The time inside does not count as training."""
        self._advance()
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def _advance(self) -> None:
        now = time.perf_counter()
        self._lap += now - self._since
        self.seconds += now - self._since
        self._since = now
