"""Stops a run on a signal, with its state saved.

The first signal that announces the end of the process asks for a stop. Later signals change
nothing, since schedulers repeat theirs. Only a second Ctrl-C or Ctrl-\\ ends the process at once,
unless a save has begun: for a person who cannot wait.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from triptych.core.machine.interrupts import after_a_stop
from triptych.core.machine.signals import heeded

IMPATIENT = (signal.SIGINT, signal.SIGQUIT)
"""Signals from a keyboard. A person may send them twice to leave at once."""
GRACE = 1.0
"""Seconds in which further signals count as the same request.

``timeout`` and job launchers send one signal to the process and one to its group. The second one
must not cost the checkpoint.
"""


@dataclass
class StopRequest:
    """The request of the first signal.

    Attributes:
        number: the signal that asked for a stop, or None.
        when: time of that signal, seconds of the monotonic clock.
        saving: whether the state is being saved. No signal breaks off a save.
    """

    number: int | None = None
    when: float = 0.0
    saving: bool = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Stores the first signal. A later one from a keyboard may end the process at once."""
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
        """No signal ends the process inside."""
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
    """Catches the signals inside. The caller looks at the request, then saves and leaves.

    A signal that the process ignores stays ignored. Outside the main thread nothing is caught,
    since Python allows no handlers there.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.handle) for number in heeded()}
    try:
        yield request
    finally:
        if request.number is not None and signal.SIGTERM in previous:
            previous[signal.SIGTERM] = after_a_stop(previous[signal.SIGTERM])
        for number, handler in previous.items():
            signal.signal(number, handler)
