"""Signals with which terminals, schedulers and the system announce the end of a process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = (
    "SIGHUP",  # the terminal is closed
    "SIGINT",  # Ctrl-C
    "SIGQUIT",  # Ctrl-\
    "SIGTERM",  # kill, timeout, systemd, docker, Slurm
    "SIGUSR1",  # Grid Engine before a limit, Slurm's --signal
    "SIGUSR2",  # Grid Engine before the end, OAR, LSF
    "SIGXCPU",  # a limit of processor time is reached
    "SIGPWR",  # the power fails
)
ENDINGS = tuple(signal.Signals[name] for name in NAMES if hasattr(signal, name))
"""The signals in ``NAMES`` that the operating system has."""


def heeded() -> tuple[signal.Signals, ...]:
    """The signals in ``ENDINGS`` that this process does not ignore.

    ``nohup`` lets a process ignore SIGHUP. A shell without job control lets background processes
    ignore SIGINT and SIGQUIT.
    """
    return tuple(number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[None]:
    """The signals in ``ENDINGS`` wait until the end of the block, if they come to this thread.

    Threads and processes that are started inside never take them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
