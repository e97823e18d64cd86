"""Leaving in good order: SIGINT and SIGTERM ask for a stop, a second one ends the process."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 1.0
"""Seconds in which further signals count as the same request: ``timeout`` and job launchers send
one to the process and one to its group, and the second must not cost the checkpoint."""


@dataclass
class StopRequest:
    """number: the signal that asked for a stop, or None."""

    number: int | None = None
    when: float = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Notes the first signal; leaves at once, with its status, at a later one."""
        if self.number is None:
            self.number, self.when = number, time.monotonic()
            with suppress(OSError):
                # Not print: a handler may have interrupted a print in progress.
                os.write(2, f"\n{signal.Signals(number).name}: saving after this step\n".encode())
        elif time.monotonic() - self.when > GRACE:
            os._exit(128 + number)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catches the signals inside; whoever looks at the request finishes, saves and leaves.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request.handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
