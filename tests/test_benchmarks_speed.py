"""The page of ratios: which commands give it, what it says, and how it goes on."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from triptych.core import cli, config
from triptych.core.benchmarks import speed, step
from triptych.core.cli import main

ANSWERS = {
    "step": [
        {"backend": "torch", "speed_over_plain": 1.25, "time_over_torch": 1.0},
        {"backend": "paddle", "time_over_torch": 2.0},
    ],
    "parallel": [{"backend": "torch"}, {"backend": "torch", "layout": "data=2", "speed": 1.75}],
    "loader": {"ratio": 3.0},
    "eval": {"knn": {"seconds": {"triptych": 1, "other": 2}, "speed_over": {"other": 2.0}}},
    "convert": {"speed_over_cp": {"to torch": 0.5}, "over_torch": {"reading": 1.5}},
}


@pytest.fixture
def commands(monkeypatch):
    """The words of the commands that run."""
    said = []

    def run(command, stdout, text, check):
        assert command[1:4] == ["-m", "triptych.core.cli", "bench"] and command[5] == "--json"
        said.append(command[4])
        failed = command[4] == "loader" and said.count("loader") == 1
        return SimpleNamespace(returncode=int(failed), stdout=json.dumps(ANSWERS[command[4]]))

    monkeypatch.setattr(subprocess, "run", run)
    return said


@pytest.mark.parametrize("measurement", speed.MEASUREMENTS, ids=lambda m: m.title)
def test_every_command_can_be_parsed_and_its_recipe_is_there(measurement):
    words = list(measurement.words)
    arguments = cli._parser(["bench", *words]).parse_args(["bench", *words])
    if recipe := getattr(arguments, "config", None):
        own = step.DEFAULTS if arguments.benchmark == "step" else ()
        config.load(recipe, [*own, *getattr(arguments, "overrides", ())])


def test_what_is_missing_is_measured_and_the_page_says_all_ratios(commands, tmp_path, capsys):
    page = tmp_path / "docs" / "speed.md"
    command = ["bench", "speed", "--answers", str(tmp_path / "answers"), "--page", str(page)]
    assert main(command) == 2
    assert "status 1 of: python tools/bench.py loader" in capsys.readouterr().err
    assert "| 1.25 |" in page.read_text() and "not run yet" in page.read_text()
    begun = len(commands)
    assert main(command) == 0
    names = [measurement.words[0] for measurement in speed.MEASUREMENTS]
    assert commands[begun:] == names[begun - 1 :] and commands[:begun] == names[:begun]
    told = page.read_text()
    assert "not run yet" not in told
    for row in (
        "| torch beside a plain loop of it | 1.25 | 1 |",
        "| paddle beside torch | 0.50 |",
        "| torch, data=2 beside one process | 1.75 |",
        "| triptych beside torchvision's DataLoader | 3.00 | 1 |",
        "| triptych beside other | 2.00 |",
        "| a conversion to torch beside cp | 0.50 |",
        "| reading beside torch.load(mmap=True) | 1.50 |",
    ):
        assert row in told


def test_a_damaged_answer_is_named(commands, tmp_path, capsys):
    (measurement, *_) = speed.MEASUREMENTS
    measurement.file(tmp_path).write_text("{")
    page = str(tmp_path / "page.md")
    command = ["bench", "speed", "--answers", str(tmp_path), "--page", page, "--write-only"]
    assert main(command) == 2
    assert "damaged; remove it, and it is measured again" in capsys.readouterr().err
