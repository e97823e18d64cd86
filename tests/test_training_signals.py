"""Which signals ask for a stop, and what a second one does."""

import os
import signal
import time

import pytest

from triptych.core.machine.signals import ENDINGS
from triptych.core.training.signals import GRACE, stop_request


@pytest.fixture
def left(monkeypatch):
    """Statuses with which the process would have ended at once."""
    found = []
    monkeypatch.setattr(os, "_exit", found.append)
    return found


def send(number):
    os.kill(os.getpid(), number)


def test_every_announcement_of_an_end_is_a_request(capfd):
    for number in ENDINGS:
        before = signal.getsignal(number)
        with stop_request() as stop:
            send(number)
            assert stop.number == number
        assert signal.getsignal(number) is before
        assert f"{number.name}: saving after this step" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_request() as stop:
            send(number)
            assert stop.number is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_repeated_changes_nothing(left):
    for number in set(ENDINGS) - {signal.SIGINT, signal.SIGQUIT}:
        with stop_request() as stop:
            send(number)
            send(number)
            stop.when = time.monotonic() - 10 * GRACE
            send(number)
            assert stop.number == number
    assert left == []


def test_only_a_later_signal_from_the_keyboard_ends_the_process(left):
    before = signal.getsignal(signal.SIGINT)
    with stop_request() as stop:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert stop.number == signal.SIGTERM
        assert left == [], "launchers send the same request twice"
        stop.when = time.monotonic() - 10 * GRACE
        send(signal.SIGINT)
        assert left == [128 + signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_save_that_has_begun_is_finished(left, capfd):
    with stop_request() as stop:
        send(signal.SIGINT)
        stop.when = time.monotonic() - 10 * GRACE
        with stop.save_in_progress():
            send(signal.SIGINT)
            assert left == []
        assert "the state is being saved, wait" in capfd.readouterr().err
        send(signal.SIGINT)
    assert left == [128 + signal.SIGINT]
