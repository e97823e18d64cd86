"""Paths and texts as people have them: ~, letters of every language, control characters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.double import TINY, finished, install, tiny

from triptych.core import cli, config

ROOT = Path(__file__).resolve().parent.parent
DOUBLE = ROOT / "tests" / "support" / "double.py"


def train(folder: Path, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A tiny run on the reference engine, in a process of its own."""
    command = [sys.executable, str(DOUBLE), "train", "-c", "moco_v3/digits", *words]
    environment = {**os.environ, **variables}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="ascii"
    )


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["latin-1", "C"],
)
def test_a_terminal_that_lacks_the_letters_of_a_path_shows_their_numbers(tmp_path, variables):
    output = "照片\x1b[31m"
    done = train(tmp_path, "--output", output, "-o", *TINY, "train.steps=2", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\x1b[31m" in done.stdout and "\x1b" not in done.stdout
    assert (tmp_path / output / "result.json").is_file()


def test_errors_show_control_characters_escaped(capsys):
    assert cli.main(["info", "-c", "no\x1b[2J\n\r\x85such"]) == 2
    printed = capsys.readouterr()
    assert printed.err.isascii() and "\x1b" not in printed.err and "\r" not in printed.err
    assert all(line.startswith("error: ") for line in printed.err.splitlines())


def test_home_is_found_wherever_a_path_is_given(tmp_path, monkeypatch, capsys):
    install(monkeypatch)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (home / "a.yaml").write_text("_base_: ~/b.yaml\n")
    (home / "b.yaml").write_text("_base_: moco_v3/digits\n")
    words = ["-c", "~/a.yaml", "--backend", "torch", "--output", "~/run", "-o", *TINY]
    assert cli.main(["train", *words, "train.stop_at=4"]) == 0
    assert cli.main(["train", *words, "--resume", "~/run", "train.stop_at=5"]) == 2  # not KEY=VALUE
    resumed = ["train", *words, "train.stop_at=5", "--resume", "~/run/checkpoints/step-00000004"]
    assert cli.main(resumed) == 0
    weights = ["--weights", "~/run", "--backend", "torch"]
    assert cli.main(["eval", "knn", "-c", "~/run/spec.yaml", *weights]) == 0
    assert cli.main(["report", "~/run", "-o", "~/page.html", "--picture", "~/p.svg"]) == 0
    assert {path.name for path in home.iterdir()} == {
        "a.yaml",
        "b.yaml",
        "run",
        "page.html",
        "p.svg",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_start_says_what_differs_from_the_recipe_and_where_the_spec_is(tmp_path, monkeypatch):
    install(monkeypatch)
    said: list[str] = []
    finished(tiny("train.steps=2"), tmp_path, say=said.append)
    assert f"resolved spec: {tmp_path / 'spec.yaml'}" in said
    assert sum(map(len, said)) < 2000
    overrides = ["train.batch_size=32", "seed=0", "data={root: a, workers: 0}", "model.width=64"]
    base = config.load("moco_v3/digits")
    expected = [f"train.batch_size=32 (not {base.train.batch_size})", "data.root='a'"]
    found = config.changes("moco_v3/digits", overrides)
    assert set(expected) <= set(found)
    assert not [line for line in found if line.startswith("seed=0 (")]
    assert config.changes("moco_v3/digits", []) == []
