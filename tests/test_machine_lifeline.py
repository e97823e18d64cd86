"""Processes end together: what is said once, and with which status."""

import os
import signal
import time

import pytest
from support.processes import PipeRanks, fork

from triptych.core.machine import lifeline

KILLED, LEFT = -signal.SIGKILL, lifeline.STATUS


def live(mesh, victim, action, grace):
    """One process: the victim does something else than the others, which wait."""
    lifeline.GRACE = grace
    line = lifeline.Lifeline(PipeRanks(mesh), "127.0.0.1")
    if mesh.rank == victim:
        action(line)
    else:
        time.sleep(20)
    os._exit(0)


def killed(line):
    os.kill(os.getpid(), signal.SIGKILL)


def gone(line):
    line.close()


def ended(world, victim, action, grace=0.1):
    """The exit status of each process."""
    processes = fork(world, live, victim, action, grace)
    start = time.monotonic()
    for process in processes:
        process.join(10)
    assert time.monotonic() - start < 10
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_process_ends_all_and_one_of_them_says_so(capfd, victim):
    wanted = [LEFT] * 3
    wanted[victim] = KILLED
    assert ended(3, victim, killed) == wanted
    remedy = "start the command again, a training with --resume auto"
    line = f"error: process {victim} of 3 has ended; {remedy}\n"
    assert capfd.readouterr().err == line


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_leaves_alone_takes_the_others_along_in_silence(capfd, victim):
    """It has said why, if there is anything to say."""
    wanted = [LEFT] * 3
    wanted[victim] = 0
    assert ended(3, victim, gone) == wanted
    assert capfd.readouterr().err == ""


def both(mesh):
    line = lifeline.Lifeline(PipeRanks(mesh), "127.0.0.1")
    time.sleep(0.2 * mesh.rank)
    line.close()
    time.sleep(0.3)
    os._exit(7)


def test_processes_that_leave_together_end_as_they_please(capfd):
    processes = fork(2, both)
    for process in processes:
        process.join(10)
    assert [process.exitcode for process in processes] == [7, 7]
    assert capfd.readouterr().err == ""
