"""``tools/bench.py convert`` on a tiny state."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from triptych import backends
from triptych.core.benchmarks import convert
from triptych.core.cli import main

TINY = ("--width", "16", "--depth", "1", "--heads", "2", "--rounds", "1")


def test_each_task_is_measured_beside_its_alternative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # In this process: a new one for each task would take seconds.
    monkeypatch.setattr(convert, "_child", lambda name, source: convert.TASKS[name](source))
    assert main(["bench", "convert", *TINY, "--folder", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    written = {f"to {name}" for name in convert.TARGETS}
    peers = set(convert.READINGS.values()) if "torch" in backends.installed() else set()
    tasks = {*written, "cp", *convert.READINGS, *peers}
    assert result["seconds"].keys() == result["peak_mib"].keys() == tasks
    assert result["speed_over_cp"].keys() == result["peak_limit_mib"].keys() == written
    assert min(result["speed_over_cp"].values()) > 0 and result["self_check_seconds"] > 0
    assert result.get("over_torch", {}).keys() == (set(convert.READINGS) if peers else set())
    assert not list(tmp_path.iterdir())


def test_a_small_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 2**20))
    assert main(["bench", "convert", "--folder", str(tmp_path)]) == 2
    assert "1 MiB are free, 10" in capsys.readouterr().err


def test_a_folder_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "convert", "--folder", str(tmp_path / "none")]) == 2
    assert f"--folder {tmp_path / 'none'}: no such folder" in capsys.readouterr().err
