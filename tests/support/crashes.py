"""A framework that ends a process of the tests costs one test a second try, and is reported.

pytest-xdist replaces the process. Its scheduler of whole files then hands out finished files again,
which keeps the other processes waiting for ever.
"""

import faulthandler
from typing import Any

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from xdist.scheduler import LoadFileScheduling

CRASHED = "crashed, run again"


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
    """The first crash of a test is no failure; the summary names it."""
    if isinstance(sched, Files) and crashitem not in sched.crashed:
        sched.crashed.add(crashitem)
        report.outcome = CRASHED


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    return (CRASHED, "C", "CRASHED") if report.outcome == CRASHED else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in terminalreporter.getreports(CRASHED):
        terminalreporter.write_line(f"CRASHED, then run again: {report.nodeid}")


def show_stacks(config: pytest.Config) -> None:
    """A crash prints the stacks of Python again, after a framework has taken its signals."""
    faulthandler.disable()
    faulthandler.enable(config.stash[fault_handler_stderr_fd_key])
