"""Makes Ctrl-C and SIGTERM end the process also during imports.

Python raises KeyboardInterrupt in the middle of an import, where it may get lost. A module written
in C turns it into an ImportError, a library may swallow it, and OneFlow replaces the handler of
SIGINT.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SEIZERS = ("oneflow._oneflow_internal",)
"""Modules whose libraries install a handler of their own while they load.

OneFlow's handler of SIGINT ends the process with status 255.
"""


@contextmanager
def leave_at_once() -> Iterator[None]:
    """SIGINT and SIGTERM inside end the process with status 128 + n, without an exception.

    Use it while there is nothing to save or to clean up. A signal that the process ignores stays
    ignored. In a thread nothing changes, since Python allows no handlers there.
    """
    before = _handlers()
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _leave)
    try:
        yield
    finally:
        _install(before)


def after_a_stop(handler: Any) -> Any:
    """The handler of SIGTERM for a process that is about to leave, in the place of ``handler``.

    Inside of ``leave_at_once`` SIGTERM is ignored then. Launchers send it several times, and to one
    process after the other. It must not end a process that still has to tell the others goodbye.
    """
    return signal.SIG_IGN if handler is _leave else handler


@contextmanager
def leave_tidily() -> Iterator[None]:
    """SIGTERM inside raises SystemExit with status 128 + 15, and Ctrl-C raises KeyboardInterrupt.

    Use it while an unfinished file has to be removed, also inside of ``leave_at_once``. A later
    SIGTERM does not disturb that. A signal that the process ignores stays ignored. In a thread
    nothing changes, since Python allows no handlers there.

    Raises:
        SystemExit: there was a SIGTERM.
        KeyboardInterrupt: there was a Ctrl-C.
    """
    before = _handlers()
    if before.get(signal.SIGTERM, signal.SIG_IGN) != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _exit)
    if before.get(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        _install(before)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """For imports: after a Ctrl-C inside, the block raises KeyboardInterrupt at its end.

    The import may replace the handlers of SIGINT and SIGTERM. They are put back whenever a module
    is looked up, and after the import. While a module in ``SEIZERS`` loads, the signals wait.

    Raises:
        KeyboardInterrupt: there was a Ctrl-C, and Python's own handler is in use.
    """
    before = _handlers()
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    during = {n: interrupt if h is signal.default_int_handler else h for n, h in before.items()}
    keeper = _Keeper(during)
    _install(during)
    sys.meta_path.insert(0, keeper)
    try:
        yield
    finally:
        sys.meta_path.remove(keeper)
        _install(during)
        with suppress(KeyboardInterrupt):
            keeper.release()
        _install(before)
        if interrupted:
            raise KeyboardInterrupt


class _Keeper:
    """A finder for ``sys.meta_path`` that finds no module, but installs the handlers."""

    def __init__(self, handlers: Mapping[int, Any]) -> None:
        self._handlers = handlers
        self._mask: set[Any] | None = None
        """The signal mask from before the signals were held back."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        # Handlers can be installed only in the main thread, and a module may start threads.
        if threading.current_thread() is threading.main_thread():
            _install(self._handlers)
            self.release()
            if name in SEIZERS:
                self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def release(self) -> None:
        """Lets the signals through that were held back; the handlers must be installed."""
        mask, self._mask = self._mask, None
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _handlers() -> dict[int, Any]:
    """The handlers that Python knows. None outside the main thread, where they cannot be set."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    return {number: handler for number, handler in handlers.items() if handler is not None}


def _install(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        # Printed text must appear. A signal in the middle of a print prevents that.
        with suppress(OSError, RuntimeError, ValueError):
            stream.flush()
    os._exit(128 + number)


def _exit(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)
