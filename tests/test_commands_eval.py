"""``eval linear`` and ``eval finetune``: from a pretraining run to the score of a classifier."""

import json
import os
import signal

import numpy as np
import pytest
from support.double import TINY, finished, install, tiny

from triptych.core import config, formats
from triptych.core.cli import main
from triptych.core.commands.eval import features
from triptych.core.runs.log import read_rows

RECIPE = """\
seed: 3
data: {name: digits, channels: 1, workers: 0}
augment: {mean: [0.5], std: [0.5]}
model: {name: vit, width: 8, depth: 1, heads: 2, patch_size: 4, image_size: 8, channels: 1}
method: METHOD
optim: {name: sgd, lr: 0.1, scale_lr_by: null}
train: {steps: 4, batch_size: 16}
log: {every: 2, tensorboard: false}
threads: 1
"""
METHODS = {
    "linear": "{name: linear, classes: 10, rates: [0.01, 10.0]}",
    "finetune": "{name: finetune, classes: 10, momentum: 0.5}",
}


@pytest.fixture(autouse=True)
def numpy_backend(monkeypatch, tmp_path):
    install(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pretrained(tmp_path):
    """A short pretraining run of the same encoder."""
    same = [name for name in TINY if not name.startswith("train.steps")]
    return finished(tiny(*same, "train.steps=2", "optim.warmup_steps=1"), tmp_path / "pretrained")


def recipe(method):
    with open(f"{method}.yaml", "w") as file:
        file.write(RECIPE.replace("METHOD", METHODS[method]))
    return ["eval", method, "-c", f"{method}.yaml", "--backend", "torch"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_trained_on_the_weights_and_scored_again(method, pretrained, tmp_path, capsys):
    run = tmp_path / "run"
    words = recipe(method)
    assert main([*words, "--weights", str(pretrained), "--output", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"init: {pretrained} (canonical, student): 18 tensors of the encoder; initial" in out
    rows = [row for row in read_rows(run / "metrics.jsonl") if "eval" in row]
    assert [row["step"] for row in rows] == [4] * len(rows), "once, at the end"
    assert [row["branch"] for row in rows] == {
        "linear": ["student"],
        "finetune": ["teacher", "student"],
    }[method]
    assert rows[0]["images"] == 360 and 0 <= rows[0]["top1"] <= rows[0]["top5"] <= 1

    before, after = (formats.read_arrays(path) for path in (pretrained, run))
    unchanged = [
        np.array_equal(before[name], array)
        for name, array in after.items()
        if name.startswith("student.encoder.blocks")
    ]
    assert all(unchanged) if method == "linear" else not any(unchanged)

    spec = str(run / "spec.yaml")
    again = ["eval", method, "-c", spec, "--weights", str(run), "--eval-only", "--json"]
    assert main(again) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == [{key: row[key] for key in printed[0]} for row in rows]


def test_a_classifier_of_unknown_origin_is_scored(pretrained, tmp_path, capsys):
    run = tmp_path / "run"
    words = recipe("finetune")
    assert main([*words, "--weights", str(pretrained), "--output", str(run)]) == 0
    spec = config.load(run / "spec.yaml")
    arrays = formats.FORMATS["timm"].from_canonical(formats.load_weights(run, spec), spec)
    np.savez("plain.npz", **{f"module.{name}": array for name, array in arrays.items()})
    capsys.readouterr()
    assert main([*words, "--weights", "plain.npz", "--eval-only", "--json"]) == 0
    (teacher, student) = json.loads(capsys.readouterr().out)
    (trained,) = [row for row in read_rows(run / "metrics.jsonl") if row.get("branch") == "student"]
    for key in ("top1", "top5", "loss", "split"):
        assert teacher[key] == student[key] == trained[key]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["eval", "linear", "-c", "finetune.yaml"],
            "error: finetune.yaml: method.name: finetune; eval linear needs a recipe with method "
            "linear",
        ),
        (
            ["eval", "finetune", "-c", "finetune.yaml", "--json"],
            "error: --json: a training's rows are in its log; give --eval-only, or none",
        ),
        (
            ["eval", "finetune", "-c", "finetune.yaml", "--eval-only", "--output", "x"],
            "error: --eval-only trains nothing; leave out --output and --resume",
        ),
        (["eval", "finetune", "-c", "finetune.yaml"], "error: none.npz: no such file"),
        (
            ["eval", "finetune", "-c", "finetune.yaml", "-o", "data={name: image_folder, root: .}"],
            "error: data.eval_root: not set; eval scores held-out images",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(words, line, capsys):
    recipe("finetune")
    assert main([*words, "--weights", "none.npz", "--backend", "torch"]) == 2
    assert capsys.readouterr().err.strip() == line


def printed(words, capsys):
    """The first row of an evaluation."""
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)[0]


def test_initial_weights_and_pixels_are_evaluated_like_trained_weights(capsys, tmp_path):
    common = ["-c", "moco_v3/digits", "-o", *TINY, "--backend", "torch"]
    words = ["eval", "lowshot", *common, "--shots", "2", "--weights"]
    initial, pixels = (printed([*words, name], capsys) for name in ("initial", "pixels"))
    assert (initial["step"], initial["branch"]) == (0, "student")
    assert pixels["tokens"] == "raw pixels"
    assert initial["digests"] == pixels["digests"] and initial["top1"] != pixels["top1"]

    run = tmp_path / "run"
    assert main([*recipe("linear"), "--weights", "initial", "--output", str(run)]) == 0
    assert config.load(run / "spec.yaml").init.weights is None


def test_a_request_to_end_leaves_no_unfinished_file(monkeypatch, pretrained):
    def export(*arguments, **options):
        assert len(os.listdir("features")) == 1, "the unfinished file"
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(features, "export", export)
    os.mkdir("features")
    words = ["eval", "features", "-c", str(pretrained / "spec.yaml"), "--backend", "torch"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--weights", str(pretrained), "--output", "features/x.npz"])
    assert (stop.value.code, os.listdir("features")) == (128 + signal.SIGTERM, [])
