"""The page of results: which commands give it, what it says, and how it goes on."""

import contextlib
import importlib
import io
import json
import shlex
import shutil
from types import SimpleNamespace

import pytest
from support.double import install

from triptych.core import config
from triptych.core.cli import main
from triptych.core.errors import UserError
from triptych.core.results import measure, table
from triptych.core.results.answers import Record, shell
from triptych.core.results.page import MISSING, write
from triptych.core.results.table import Recipe, tables

MODEL = "{name: vit, width: 8, depth: 1, heads: 2, patch_size: 4, image_size: 8, channels: 1}"
COMMON = f"""\
threads: 1
data: {{name: digits, channels: 1, workers: 0}}
augment: {{mean: [0.5], std: [0.5]}}
model: {MODEL}
log: {{every: 1, tensorboard: false}}
evaluate: {{per_class: [60, 10]}}
"""
METHODS = {
    "": "method: {name: moco_v3, hidden_dim: 12, output_dim: 8}\ntrain: {steps: 2, batch_size: 8}",
    "_linear": "method: {name: linear, classes: 10, features: cached}\n"
    "train: {steps: 2, batch_size: 8}",
    "_finetune": "method: {name: finetune, classes: 10}\ntrain: {steps: 2, batch_size: 8}",
}


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """The table of one tiny recipe. Commands run in this process, on the NumPy reference."""
    install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    recipes = importlib.import_module("triptych.core.config.recipes")
    monkeypatch.setattr(recipes, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(recipes, "ALIASES", {})
    monkeypatch.setattr(table, "STEPS", {"1%": 1})
    (tmp_path / "configs").mkdir()
    for name, text in METHODS.items():
        (tmp_path / "configs" / f"tiny{name}.yaml").write_text(f"{COMMON}{text}\n")
    return tables(tmp_path / "runs", (Recipe("tiny", "a tiny encoder"),), ("data.on_error=stop",))


@pytest.fixture
def commands(monkeypatch):
    """The words of the commands that run."""
    said = []

    def run(command: list[str], stdout: int | None, check: bool) -> SimpleNamespace:
        assert command[1:3] == ["-m", "triptych.core.cli"] and not check
        said.append(command[3:])
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = main([*command[3:], "--backend", "torch"])
        return SimpleNamespace(returncode=status, stdout=out.getvalue())

    monkeypatch.setattr(measure.subprocess, "run", run)
    return said


def test_every_row_is_measured_once_and_nothing_again(rows, commands, tmp_path):
    page, kept = tmp_path / "docs" / "results.md", tmp_path / "docs" / "results.json"
    measure.measure(rows, Record(kept), page, lambda line: None)
    assert len(commands) == len({tuple(words) for words in commands}) == len(table.jobs(rows))
    assert commands[0][:3] == ["train", "-c", "tiny"], "pretraining comes first"
    text = page.read_text()
    assert MISSING not in text
    for words in commands:
        assert f"python tools/{words[0]}.py {shlex.join(words[1:])}" in text
    row = next(line for line in text.splitlines() if line.startswith("| fine-tuning | 1 %"))
    run = json.loads((tmp_path / "runs/tiny/finetune-trained-1/result.json").read_text())
    assert f"| {100 * run['evaluations'][-1]['top1']:.1f} |" in row
    spec = config.load(tmp_path / "runs/tiny/finetune-trained-1/spec.yaml")
    assert (spec.data.labelled, spec.train.steps) == ("1%", 1)
    assert spec.init.weights == str(tmp_path / "runs/tiny/pretrained")
    scratch = config.load(tmp_path / "runs/tiny/finetune-initial-1/spec.yaml")
    assert scratch.init.weights is None
    assert (scratch.data, scratch.optim, scratch.train) == (spec.data, spec.optim, spec.train)

    before = len(commands)
    measure.measure(rows, Record(kept), page, lambda line: None)
    assert len(commands) == before and page.read_text() == text

    shutil.rmtree(tmp_path / "runs")
    measure.measure(rows, Record(kept), page, lambda line: None)
    assert len(commands) == before and page.read_text() == text, "the runs may be gone"

    answers = json.loads(kept.read_text())
    probe = next(line for line in answers if "eval.py linear" in line and "pretrained" in line)
    wanted = answers.pop(probe)
    kept.write_text(json.dumps(answers))
    measure.measure(rows, Record(kept), page, lambda line: None)
    again = [f"python tools/{words[0]}.py {shlex.join(words[1:])}" for words in commands[before:]]
    assert [line.split()[1] for line in again] == ["tools/train.py", "tools/eval.py"]
    assert again[1] == probe, "it needs the pretraining"
    assert Record(kept).answer(probed(rows, probe)).scores == wanted["scores"]


def probed(rows, line):
    """The job of a command line."""
    return next(job for job in table.jobs(rows) if shell(job) == line)


def test_a_failed_command_ends_it_and_the_next_call_goes_on(rows, commands, tmp_path, monkeypatch):
    page = tmp_path / "results.md"
    monkeypatch.setattr(measure, "_run", lambda job: (_ for _ in ()).throw(UserError("killed")))
    with pytest.raises(UserError, match="killed"):
        measure.measure(rows, Record(page.with_suffix(".json")), page, lambda line: None)
    write(rows, Record(page.with_suffix(".json")), page)
    assert "Commands: 0 of" in page.read_text()
    assert page.read_text().count(MISSING) > 20


def answered(record, rows, cell, top1):
    """Stores an answer of one row under a cell."""
    path = cell.job.output / "result.json" if cell.job.trains else cell.job.output
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"eval": "knn", "step": 1, "top1": top1, cell.key or "k": cell.value or 1}
    found.setdefault("labels", "all")
    stamp = {"versions": {"torch": "0"}, "threads": 1, "seed": 0, "steps": 1}
    rows_of = {"evaluations": [found], "rows": [found]}
    found |= {"temperature": 0.07, "k": 1}
    path.write_text(json.dumps({**rows_of, "seconds": 1.0, **stamp}))
    record.take(cell.job, table.cells(rows))


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ((0.7, 0.6, 0.5), "| beats all |"),
        ((0.7, 0.8, 0.5), "| **does not beat from scratch** |"),
        ((0.8, 0.6, 0.9), "| **does not beat random initial weights and raw pixels** |"),
        ((0.7,), "| beats those measured |"),
    ],
)
def test_a_row_says_whether_the_trained_encoder_is_ahead(rows, tmp_path, others, said):
    line, record = rows[0].lines[0], Record(tmp_path / "page.json")
    answered(record, rows, line.cells["trained"], 0.8)
    for column, top1 in zip(("initial", "scratch", "pixels"), others, strict=False):
        answered(record, rows, line.cells[column], top1)
    write(rows, record, tmp_path / "page.md")
    text = next(t for t in (tmp_path / "page.md").read_text().split("\n") if "k-NN | all" in t)
    assert "| 80.0 |" in text and text.endswith(said)


def test_a_damaged_answer_is_named(rows, tmp_path):
    job = rows[0].lines[0].cells["trained"].job
    job.output.parent.mkdir(parents=True)
    job.output.write_text("{")
    kept = tmp_path / "page.json"
    with pytest.raises(UserError, match=f"{job.output}: damaged; remove it"):
        Record(kept).take(job, table.cells(rows))
    for text in ("{", "[]", '{"python tools/train.py": {}}'):
        kept.write_text(text)
        with pytest.raises(UserError, match=f"{kept}: damaged; remove it"):
            Record(kept)


def test_the_shipped_table_has_its_recipes():
    for recipe in table.RECIPES:
        specs = [config.load(f"{recipe.name}{end}") for end in METHODS]
        assert specs[0].model == specs[1].model == specs[2].model
        assert [spec.method.name for spec in specs[1:]] == ["linear", "finetune"]
        assert specs[0].evaluate.branch == specs[1].init.branch == specs[2].init.branch
        assert specs[0].evaluate.tokens == specs[1].method.pooling == specs[2].method.pooling
