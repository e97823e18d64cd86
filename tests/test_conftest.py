"""The comparison that every parity test rests on must itself fail when it should.

A crash of a framework must neither stop the suite nor go unseen.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_close, relative_error

VALUES = np.array([1.0, -2.0, 4.0])


def test_equal_and_nearly_equal_pass():
    assert_close(VALUES, VALUES, 0.0)
    assert_close(np.zeros(3), np.zeros(3), 0.0)
    assert_close(VALUES * (1 + 1e-13), VALUES, 1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        VALUES + np.array([5e-6, 0, 0]),
        -VALUES,
        np.full(3, np.nan),
        np.array([np.inf, -2.0, 4.0]),
        VALUES[:2],
        VALUES[:, None],
        VALUES[[1, 0, 2]],
        np.zeros(3),
    ],
)
def test_anything_else_fails(wrong):
    with pytest.raises(AssertionError):
        assert_close(wrong, VALUES, 1e-6)


def test_zero_expected_values_accept_only_zeros():
    with pytest.raises(AssertionError):
        assert_close([1e-30], [0.0], 1.0)


def test_the_error_is_relative_to_the_largest_expected_value():
    assert relative_error(VALUES + np.array([0.4, 0, 0]), VALUES) == pytest.approx(0.1)


CRASHES = """
import os, pathlib, pytest, signal
@pytest.mark.parametrize("number", range(6))
def test_it(number):
    if number == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # as some frameworks do
    runs = pathlib.Path(__file__ + str(number))
    runs.open("a").write("x")
    if number == {always} or number in {once} and runs.read_text() == "x":
        os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.mark.parametrize(
    ("once", "always", "last"),
    [((1,), None, "9 passed, 1 crashed"), ((1, 2, 4), 3, "3 failed, 8 passed, 2 crashed")],
    ids=["once", "twice and too often"],
)
def test_a_test_that_ends_its_process_has_a_second_try(tmp_path, once, always, last):
    (tmp_path / "test_crashes.py").write_text(CRASHES.format(once=once, always=always))
    for name in ("test_a.py", "test_b.py", "test_c.py"):
        (tmp_path / name).write_text("def test_it():\n    pass\n" * 3)
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "support.crashes"]
    command += ["-n2", "--dist=loadfile"]
    alone = {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment = {**os.environ, **alone}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == (1 if "failed" in last else 0)
    assert "CRASHED, then run again: test_crashes.py::test_it[1]" in done.stdout
    assert last in done.stdout
    assert "Segmentation fault" in done.stderr
    runs = [len((tmp_path / f"test_crashes.py{number}").read_text()) for number in range(6)]
    assert runs == [2 if number in (*once, always) else 1 for number in range(6)]
