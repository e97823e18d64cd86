"""Throughput of a run: time spent training, images per second, share of time waiting for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Measures steps against time. The time of evaluations and saves does not count.

    Attributes:
        seconds: training time so far, including the processes before a resume.
        evaluating: time of the evaluations so far, likewise up to the checkpoint of a resume.
    """

    def __init__(self, batch_size: int, seconds: float = 0.0, evaluating: float = 0.0) -> None:
        self.batch_size, self.seconds = batch_size, seconds
        self.evaluating = self._evaluated = evaluating
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
        self._evaluated = self.evaluating
        return rates

    def evaluation_share(self) -> float:
        """Share of the time since the last call of ``lap`` that evaluations took, 0 to 1."""
        self._advance()
        return _share(self.evaluating - self._evaluated, self._lap)

    def whole_evaluation_share(self) -> float:
        """Share of the time of training and evaluations that evaluations took, 0 to 1."""
        return _share(self.evaluating, self.seconds)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The time inside counts as evaluation, not as training."""
        with self.pause():
            begun = time.perf_counter()
            try:
                yield
            finally:
                self.evaluating += time.perf_counter() - begun

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


def _share(evaluating: float, training: float) -> float:
    return evaluating / max(evaluating + training, 1e-9)
