"""What the command line makes of errors of the operating system."""

import errno
import os
from pathlib import Path

import pytest

from triptych.core import cli
from triptych.core.machine import launchers


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENAMETOOLONG, errno.ESTALE])
def test_a_fault_of_a_file_names_the_file(capfd, number):
    def fail():
        raise OSError(number, os.strerror(number), "/share/file")

    assert cli.exit_status(fail) == 2
    assert capfd.readouterr().err == f"error: /share/file: {os.strerror(number)}\n"


def test_a_fault_of_no_known_file_is_no_fault_of_standard_output():
    def fail():
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        cli.exit_status(fail)


def test_the_end_of_a_line_in_a_path_ends_no_error(capfd, tmp_path):
    path = str(tmp_path / "two\nlines.yaml")
    assert cli.main(["info", "-c", path]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/two\\nlines.yaml: no such file")


def test_the_home_of_nobody_is_no_folder_of_that_name(capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert cli.path("~/runs") == Path("/home/me/runs")
    assert cli.main(["report", "~nobody-of-that-name/run"]) == 2
    error = capsys.readouterr().err
    assert "no user nobody-of-that-name here; write ./~nobody-of-that-name/run" in error


def test_a_bad_command_line_is_told_by_the_first_process_of_a_machine(capsys, monkeypatch):
    told = []
    monkeypatch.setattr(launchers.time, "sleep", lambda _: told.append(capsys.readouterr().err))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", number)
        assert cli.main(["train", "--nosuch"]) == cli.BAD_INPUT
    assert len(told) == 1 and told[0].count("error: ") == 1
