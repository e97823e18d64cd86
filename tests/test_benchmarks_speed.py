"""The page of ratios: which commands give it, what it says, and how it goes on."""

import json
import os
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


STEP, KNN = speed.MEASUREMENTS[0], next(m for m in speed.MEASUREMENTS if m.words[-1] == "knn")
DAMAGED = [
    *((STEP, text) for text in ("{", "{}", "[]", '[{"backend": "torch"}]')),
    *((STEP, f'[{{"backend": "torch", "speed_over_plain": {x}}}]') for x in ('"x"', "null", "NaN")),
    (STEP, '[{"backend": "torch", "time_over_torch": 0}]'),
    (KNN, '{"knn": {"seconds": {}, "speed_over": {}}}'),
]


@pytest.mark.parametrize(("measurement", "text"), DAMAGED)
def test_a_damaged_answer_is_named_before_any_is_measured(
    commands, tmp_path, capsys, measurement, text
):
    measurement.file(tmp_path).write_text(text)
    command = ["bench", "speed", "--answers", str(tmp_path), "--page", str(tmp_path / "page.md")]
    for options in ([], ["--write-only"]):
        assert main([*command, *options]) == 2
        said = capsys.readouterr().err
        assert "damaged; remove it, and it is measured again" in said
        assert str(measurement.file(tmp_path)) in said and not commands


def test_a_page_that_cannot_be_written_is_named_before_anything_is_measured(
    commands, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")  # for a device, which a file must not replace either
    for name, reason in (("pipe", "not a file"), ("file/x/page.md", "Not a directory")):
        page = str(tmp_path / name)
        assert main(["bench", "speed", "--answers", str(tmp_path), "--page", page]) == 2
        said = capsys.readouterr().err
        assert page in said and reason in said and not commands
    assert (tmp_path / "pipe").is_fifo()
    assert main(["bench", "speed", "--page", ""]) == 2
    assert "--page: expected a path" in capsys.readouterr().err


def test_answers_of_another_machine_stay_by_themselves(commands, tmp_path, capsys, monkeypatch):
    """The page says on which machine and with which versions its ratios were measured."""
    page = tmp_path / "page.md"
    command = ["bench", "speed", "--answers", str(tmp_path / "own"), "--page", str(page)]
    monkeypatch.setattr(speed, "processor_name", lambda: "processor A")
    assert main(command) == 2 and main(command) == 0
    count = len(commands)
    monkeypatch.setattr(speed, "processor_name", lambda: "processor B")
    assert main([*command, "--write-only"]) == 0
    assert "- Machine: processor A, " in page.read_text()
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "processor A" in said and "here: processor B" in said and "--answers" in said
    (tmp_path / "own" / "conditions.json").write_text("[]")
    assert main(command) == 2
    assert "conditions.json: damaged" in capsys.readouterr().err
    assert len(commands) == count
