"""A crash that ends one of several processes of tests is reported, and the test is run again.

Frameworks crash now and then without a cause that can be found. A few such crashes are no failure
if the test passes in another process. pytest-xdist replaces the process. Its scheduler of whole
files then hands out finished files again, which keeps the other processes waiting for ever.
"""

import faulthandler
from typing import Any

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from xdist.scheduler import LoadFileScheduling

CRASHED = "crashed, run again"
PARDONED = 2
"""Crashes that may be no failure. xdist gives up after eight, and does not call that a failure."""


class Files(LoadFileScheduling):
    """Gives whole files to the processes, and what a process left undone to another one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.crashed: set[str] = set()

    def remove_node(self, node: Any) -> str | None:
        """Takes back what a process left undone, except a test that crashed before.

        Returns:
            The test during which the process ended; None if it had no more tests.
        """
        files = self.assigned_work[node]
        left = {file: tests for file, tests in files.items() if not all(tests.values())}
        file, test = next(((f, t) for f in left for t in left[f] if not left[f][t]), (None, None))
        if file and test in self.crashed:
            left[file][test] = True
            if all(left[file].values()):
                del left[file]
        self.assigned_work[node] = left
        super().remove_node(node)
        return test

    def _reschedule(self, node: Any) -> None:
        if node not in self.registered_collections:
            return  # a new process that does not know its tests yet; ``schedule`` follows
        super()._reschedule(node)
        # A process starts a test only when it knows the next one, or that there is none.
        if self._pending_of(self.assigned_work[node]) == 1:
            super()._reschedule(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files | None:
    return Files(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: Any, sched: Any) -> None:
    """A crash is no failure if the test and few others had none before; the summary names it."""
    if isinstance(sched, Files):
        if crashitem not in sched.crashed and len(sched.crashed) < PARDONED:
            report.outcome = CRASHED
        sched.crashed.add(crashitem)


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    return (CRASHED, "C", "CRASHED") if report.outcome == CRASHED else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in terminalreporter.getreports(CRASHED):
        terminalreporter.write_line(f"CRASHED, then run again: {report.nodeid}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A crash prints the stacks of Python also after a framework has taken its signals."""
    _show_stacks(item.config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Likewise, since the fixtures of a test load frameworks."""
    _show_stacks(item.config)


def _show_stacks(config: pytest.Config) -> None:
    faulthandler.disable()
    faulthandler.enable(config.stash[fault_handler_stderr_fd_key])
