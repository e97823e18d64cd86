"""Runs of linear probe and fine-tuning: one curve, a relay, resuming, kills, on every backend."""

import json

import numpy as np
import pytest
import yaml
from conftest import TOLERANCE, assert_close, requested
from support import kills
from support.marks import marked
from test_training_resume import NUMPY

from triptych import backends
from triptych.core import checkpoint, reference
from triptych.core.config.spec import RunSpec
from triptych.core.runs.log import read_rows
from triptych.core.training import run

STEPS, LEG = 12, 4
VIT = {
    "name": "vit",
    "width": 16,
    "depth": 3,
    "heads": 2,
    "patch_size": 4,
    "image_size": 8,
    "channels": 1,
}
TRAINED = {"freeze_positions": False, "freeze_patch_embed": False}
RUNS = {
    "sweep": {
        "method": {"name": "linear", "pooling": "both", "blocks": 2, "rates": [1.0, 0.1]},
        "optim": {"name": "sgd", "lr": 1.0},
    },
    "cached": {
        "method": {"name": "linear", "pooling": "mean", "features": "cached"},
        "optim": {"name": "sgd", "lr": 1.0},
    },
    "finetune": {
        "model": {**TRAINED, "fc_norm": True},
        "method": {
            "name": "finetune",
            "pooling": "mean",
            "drop_path": 0.3,
            "momentum": 0.9,
            "mixing": {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1},
        },
        "optim": {
            "name": "adamw",
            "lr": 1e-3,
            "layer_decay": 0.75,
            "decay_on": "weights",
            "clip_norm": 1.0,
            "warmup_steps": 2,
        },
    },
    "finetune_resnet": {
        "model": {"name": "resnet18", "width": 4, "stem": "small"},
        "method": {"name": "finetune", "momentum": 0.9},
        "optim": {"name": "sgd", "lr": 0.1},
    },
}
"""Between them, all that the networks of supervised runs can do."""
CASES = marked(RUNS, ("finetune_resnet", "cached"), pytest.mark.one_backend)


def settings(name, runs=RUNS):
    """A run of a second on the digits."""
    model = runs[name].get("model", {})
    base = {key: VIT[key] for key in ("image_size", "channels")} if "name" in model else VIT
    method = {"classes": 10, **runs[name]["method"]}
    return {
        "threads": 1,
        "precision": "float64",
        "data": {"name": "digits", "channels": 1, "workers": 0},
        "augment": {"mean": [0.3], "std": [0.4]},
        "model": {**base, **model},
        "method": method,
        "optim": {"scale_lr_by": None, **runs[name]["optim"]},
        "train": {"steps": STEPS, "batch_size": 16},
        "log": {"every": 1, "tensorboard": False},
        "evaluate": {"every": 0},
        "checkpoint": {"every": LEG},
    }


def train(name, backend_name, folder, stop_at=None, resume=None):
    """Trains, and returns the logged losses."""
    given = settings(name)
    given["train"]["stop_at"] = stop_at
    spec = RunSpec.model_validate(given)
    assert run.train(spec, backend_name, folder, resume=resume, say=lambda text: None) is None
    return np.array([row["loss"] for row in read_rows(folder / "metrics.jsonl")])


def final_state(folder):
    return checkpoint.read(checkpoint.latest(folder, print))[1]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The losses and the last state of a run on the NumPy reference, by name."""
    found = {}

    def make(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name) / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(backends, "load", lambda _: reference)
                found[name] = train(name, "torch", folder), final_state(folder)
        return found[name]

    return make


@pytest.fixture(scope="module")
def whole(backend, backend_name, tmp_path_factory):
    """Folders of undisturbed runs of a backend, by name."""
    found = {}

    def make(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(f"{name}-{backend_name}") / "run"
            train(name, backend_name, folder)
            found[name] = folder
        return found[name]

    return make


def agree(folder, losses, want, name):
    """Losses and every tensor of the last state, moments too."""
    assert_close(losses, want[0], TOLERANCE["float64"]["curve"], name)
    found = final_state(folder)
    assert found.keys() == want[1].keys()
    for key, array in want[1].items():
        if np.abs(array).max() > 1e-6:  # others are rounding, as the bias of the keys is
            assert_close(found[key], array, TOLERANCE["float64"]["state"], f"{name} {key}")


@pytest.mark.parametrize("name", CASES)
def test_every_framework_draws_the_same_curve(whole, expected, name):
    losses, folder = read_losses(whole(name)), whole(name)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    agree(folder, losses, expected(name), name)


def read_losses(folder):
    return np.array([row["loss"] for row in read_rows(folder / "metrics.jsonl")])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_round_all_frameworks(expected, name, tmp_path):
    names = requested() or backends.installed()
    if not names:
        pytest.skip("no backend")
    previous = None
    for leg in range(STEPS // LEG):
        folder = tmp_path / str(leg)
        of = names[leg % len(names)]
        losses = train(name, of, folder, stop_at=(leg + 1) * LEG, resume=previous)
        previous = str(folder)
    agree(folder, losses, expected(name), name)


@pytest.mark.parametrize("name", CASES)
def test_resuming_is_exact(backend_name, whole, name, tmp_path):
    folder = tmp_path / "run"
    train(name, backend_name, folder, stop_at=7)
    train(name, backend_name, folder, resume="auto")
    assert kills.compare(whole(name), folder) == []


def test_the_encoder_of_a_probe_stays_as_it_was(whole):
    result = json.loads((whole("sweep") / "result.json").read_text())
    first = json.loads((whole("cached") / "result.json").read_text())
    assert result["frozen_encoder"] == first["frozen_encoder"]  # of the same seed
    state = final_state(whole("sweep"))
    assert not any(name.startswith("teacher.") for name in state)
    kind = "optimizer.momentum_buffer."
    moments = {name.removeprefix(kind) for name in state if name.startswith(kind)}
    assert moments == {
        f"student.classifier.{i}.{part}" for i in "01" for part in ("weight", "bias")
    }


@pytest.mark.soak
def test_kills_change_no_bit_of_a_fine_tuning(tmp_path, monkeypatch, capsys):
    given = settings("finetune")
    given["checkpoint"]["every"] = 3
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    monkeypatch.setattr(kills, "MAIN", NUMPY + kills.MAIN)
    monkeypatch.setattr(kills, "SMALL", ())
    arguments = ["--backend", "torch", "--steps", "14", "--kills", "1", "--seed", "1"]
    config = ["-c", str(tmp_path / "run.yaml"), "--workers", "0"]
    assert kills.main([*arguments, *config, "--output", str(tmp_path / "soak")]) == 0
    assert "bit-identical" in capsys.readouterr().out
