"""The check of a GPU: a dry run on the CPU, and what makes it fail."""

import json
import subprocess

import pytest
from conftest import requested

from triptych.core.benchmarks import gpu, gpu_check, gpu_numbers, gpu_speed
from triptych.core.benchmarks.gpu import PARTS
from triptych.core.benchmarks.gpu_check import Check, Row
from triptych.core.cli import main

DRY = ["bench", "gpu", "--dry-run"]


def test_a_dry_run_measures_every_part(tmp_path, capsys):
    pytest.importorskip("torch")
    if "torch" not in (requested() or ("torch",)):
        pytest.skip("torch is not under test")
    assert main([*DRY, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["ok"] and [part["part"] for part in report["parts"]] == list(PARTS)
    rows = {part["part"]: part["rows"] for part in report["parts"]}
    assert all(rows[part] for part in PARTS if part != "rough")  # a CPU has no TF32
    out = capsys.readouterr().out
    assert out == (tmp_path / "gpu.md").read_text() + "\n"
    assert "on cpu: every part ran, which says nothing about a GPU" in out
    assert "| exact | moco_v3/digits float64 against cpu" in out and "| silent | kernels" in out


@pytest.mark.parametrize("recipe", [*gpu_check.DIGITS, *gpu_speed.SPEED])
def test_a_card_finds_every_recipe_valid(recipe):
    """A dry run takes the first one alone."""
    check = Check("cpu", gpu, "torch", small=False)
    assert check.sized(recipe, 64).train.batch_size == 64


@pytest.fixture
def given(monkeypatch):
    """Replaces the measurements by rows, or by the error of a process."""

    def choose(*rows, error=None):
        found = {"error": error} if error else {"rows": [vars(row) for row in rows]}
        machine = {"rows": [vars(Row("copy, GB/s", 1.0))]}
        monkeypatch.setattr(
            gpu, "_child", lambda arguments, part, left: machine if part == "machine" else found
        )

    return choose


@pytest.mark.parametrize(
    ("row", "status"),
    [
        (Row("x", 1.0, most=1.0), 0),
        (Row("x", 1.1, most=1.0), 1),
        (Row("x", 0.9, least=1.0), 1),
        (Row("x", float("nan"), most=1.0), 1),
        (Row("x", 9.0, foreseen=1.0), 0),
    ],
)
def test_a_figure_that_misses_its_bar_fails_the_check(given, capsys, row, status):
    given(row)
    assert main(["bench", "gpu"]) == status
    out = capsys.readouterr().out
    assert ("FAILED" in out) == bool(status) and "| exact | x |" in out


def test_a_part_that_ends_with_an_error_fails_the_check(given, capsys):
    given(error="error: device: out of memory")
    assert main(["bench", "gpu"]) == 1
    assert "| speed | error: device: out of memory | FAILED |" in capsys.readouterr().out


def test_a_part_that_is_not_reached_fails_the_check(given, capsys):
    given(Row("x", 1.0))
    assert main(["bench", "gpu", "--minutes", "0"]) == 1
    assert "| speed | no time was left | FAILED |" in capsys.readouterr().out


def test_a_first_part_that_is_not_done_in_time_is_no_missing_device(monkeypatch, capsys):
    def late(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", late)
    assert main(["bench", "gpu", "--minutes", "0.5"]) == 1
    assert (
        "| machine | it was not done when the time was over | FAILED |" in capsys.readouterr().out
    )


def test_a_place_for_the_report_is_made_before_the_measurement(given, tmp_path, capsys):
    given(Row("x", 1.0))
    (tmp_path / "file").write_text("")
    assert main(["bench", "gpu", "--out", str(tmp_path / "file")]) == 2
    printed = capsys.readouterr()
    assert "name another folder" in printed.err and not printed.out
    assert main(["bench", "gpu", "--out", ""]) == 2
    capsys.readouterr()
    for minutes in ("-1", "nan", "inf"):
        assert main(["bench", "gpu", "--minutes", minutes]) == 2
        assert "expected a number of 0 or more" in capsys.readouterr().err


def test_without_a_card_there_is_one_line(monkeypatch, capsys):
    text = "error: device: 'cuda:0', but torch sees 0 CUDA devices here; use auto or cpu"
    monkeypatch.setattr(gpu, "_child", lambda arguments, part, left: {"error": text})
    assert main(["bench", "gpu"]) == 2
    assert capsys.readouterr().err == text.replace("device", "bench gpu: device", 1) + "\n"


def test_rough_products_must_be_worse_than_allowed(monkeypatch):
    """The bar of the part that proves that the comparison sees TF32."""
    near = Row("x", 0.5, most=1.0)
    monkeypatch.setattr(gpu_numbers, "_against_cpu", lambda *arguments: near)
    check = Check("cuda:0", gpu, "torch", small=False)
    assert [row.ok for row in gpu_numbers.rough(check)] == [False]
    assert list(gpu_numbers.rough(Check("cpu", gpu, "torch", small=True))) == []
