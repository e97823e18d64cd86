"""Ctrl-C and SIGTERM while modules are imported: the process has to obey, whatever is running.

Python raises KeyboardInterrupt in the middle of an import. A module written in C makes an
ImportError of it, a library may swallow it, and OneFlow replaces the handler of SIGINT by its own.
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


@contextmanager
def leave_at_once() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM end the process with status 128 + n, without an exception.

    This is for a time in which there is nothing to save and nothing to tidy up. A signal that the
    process ignores stays ignored. In a thread, where Python allows no handlers, nothing changes.
    """
    before = _handlers()
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _leave)
    try:
        yield
    finally:
        _install(before)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """For imports: a Ctrl-C inside ends in KeyboardInterrupt, whatever the import makes of it.

    The handlers of SIGINT and SIGTERM are those from before, after the import and, as far as
    possible, during it: each module that is looked up puts them back.

    Raises:
        KeyboardInterrupt: there was a Ctrl-C, and Python's own handler is the one in use.
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
        _install(before)
        if interrupted:
            raise KeyboardInterrupt


class _Keeper:
    """The first finder of ``sys.meta_path``: it finds nothing, and installs the handlers."""

    def __init__(self, handlers: Mapping[int, Any]) -> None:
        self._handlers = handlers

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        # A handler may be installed in the main thread only; a module may start threads.
        if threading.current_thread() is threading.main_thread():
            _install(self._handlers)


def _handlers() -> dict[int, Any]:
    """The handlers that Python knows; none outside the main thread, which may not change them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in SIGNALS}
    return {number: handler for number, handler in found.items() if handler is not None}


def _install(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        # What was printed is to be seen, unless the signal came in the middle of a print.
        with suppress(OSError, RuntimeError, ValueError):
            stream.flush()
    os._exit(128 + number)
