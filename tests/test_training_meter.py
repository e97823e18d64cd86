"""Throughput: what counts as training time, on a clock that the test turns."""

import pytest

from triptych.core.training import meter


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meter, "time", clock)
    return clock


def test_a_lap_is_measured_from_the_last_one_without_pauses(clock):
    watch = meter.Meter(32, seconds=5.0)
    for _ in range(4):
        clock.now += 0.5
        watch.count()
    assert watch.lap(waited=0.4) == (pytest.approx(64.0), pytest.approx(0.2))
    with watch.pause():
        clock.now += 60.0
    clock.now += 1.0
    watch.count()
    with watch.pause():
        clock.now += 60.0
    clock.now += 1.0
    watch.count()
    assert watch.lap(waited=0.6) == (pytest.approx(32.0), pytest.approx(0.1))
    assert watch.seconds == pytest.approx(5.0 + 2.0 + 2.0)
