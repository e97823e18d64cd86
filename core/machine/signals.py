"""The signals by which terminals, schedulers and the system announce that a process has to end."""

import signal

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
"""Those of ``NAMES`` that the operating system has."""


def heeded() -> tuple[signal.Signals, ...]:
    """Those of ``ENDINGS`` that this process does not ignore.

    ``nohup`` ignores SIGHUP, a shell without job control SIGINT and SIGQUIT in the background.
    """
    return tuple(number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN)
