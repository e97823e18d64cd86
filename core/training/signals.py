"""Leaving in good order: a signal that announces the end asks for a stop, after which all is saved.

Later signals change nothing, since schedulers repeat theirs. A person who cannot wait has Ctrl-C
and Ctrl-\\: the second of these ends the process at once, but for a save that has begun.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from triptych.core.machine.signals import heeded

IMPATIENT = (signal.SIGINT, signal.SIGQUIT)
"""Signals from a keyboard, which a person sends again."""
GRACE = 1.0
"""Seconds in which further signals count as the same request: ``timeout`` and job launchers send
one to the process and one to its group, and the second must not cost the checkpoint."""


class Stopped(Exception):
    """What is being done is given up, since a stop is asked for."""


@dataclass
class StopRequest:
    """What a signal has asked for.

    Attributes:
        number: the signal that asked for a stop, or None.
        when: the time of the signal, in seconds of the monotonic clock.
        saving: whether the state is being saved, which nothing may break off.
    """

    number: int | None = None
    when: float = 0.0
    saving: bool = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Notes the first signal; at a later one from a keyboard the process may end at once."""
        name = signal.Signals(number).name
        if self.number is None:
            self.number, self.when = number, time.monotonic()
            _say(f"\n{name}: saving after this step\n")
        elif number not in IMPATIENT or time.monotonic() - self.when <= GRACE:
            return
        elif self.saving:
            _say(f"\n{name}: the state is being saved, wait\n")
        else:
            _say(f"\n{name}: leaving at once, what is not saved is lost\n")
            os._exit(128 + number)

    @contextmanager
    def save_in_progress(self) -> Iterator[None]:
        """Inside, no signal ends the process."""
        self.saving = True
        try:
            yield
        finally:
            self.saving = False


def _say(text: str) -> None:
    with suppress(OSError):
        # Not print: a handler may have interrupted a print in progress.
        os.write(2, text.encode())


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catches the signals inside; whoever looks at the request finishes, saves and leaves.

    A signal that the process ignores stays ignored. Outside the main thread, where Python allows
    no handlers, nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.handle) for number in heeded()}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
