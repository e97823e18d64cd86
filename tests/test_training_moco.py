"""Whole runs of MoCo v2, and SGD, on every backend: what is logged, resume, another framework."""

import numpy as np
import pytest
from support import kills
from support.double import saved

from triptych import backends
from triptych.core import checkpoint, config, reference
from triptych.core.contracts import Batch, Hyper
from triptych.core.runs.log import read_rows
from triptych.core.training import run

SMALL = (
    "data.workers=0",
    "model.width=2",
    "model.image_size=8",
    "method.queue_size=40",
    "method.output_dim=6",
    "optim={name: sgd, lr: 0.05, scale_lr_by: null, schedule: multistep, milestones: [6]}",
    "train.batch_size=16",
    "train.steps=9",
    "batch_norm.virtual_ranks=2",
    "checkpoint.every=3",
    "log.every=1",
    "log.tensorboard=false",
    "evaluate.every=0",
    "threads=1",
)


def spec(*overrides):
    # The recipe's own optimizer may have keys that SGD has not.
    return config.load("moco_v2/digits", ["optim=null", *SMALL, *overrides])


def train(name, folder, *overrides, resume=None):
    status = run.train(spec(*overrides), name, folder, resume=resume, say=lambda text: None)
    assert status is None
    return folder


def losses(folder):
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if "eval" not in row]


@pytest.fixture(scope="session")
def whole(backend, backend_name, tmp_path_factory):
    """An undisturbed run of each backend in float64."""
    return train(backend_name, tmp_path_factory.mktemp(backend_name), "precision=float64")


def test_rows(whole):
    rows = read_rows(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 10))
    for row in rows:
        assert row["chance"] == pytest.approx(np.log(41))
        assert 0 <= row["acc1"] <= row["acc5"] <= 100
        assert row["ema"] == 0.99
        # Until the queue holds keys only, its loss says nothing.
        assert row["step"] > 3 or row["state"] == "at chance"
    assert [row["lr"] for row in rows] == pytest.approx([0.05] * 6 + [0.005] * 3)
    assert rows[0]["loss"] < 0.9 * np.log(41)


def test_a_checkpoint_holds_the_queue(whole):
    assert saved(whole) == [f"step-0000000{k}" for k in (3, 6, 9)]
    for step in (3, 9):
        _, state = checkpoint.read(whole / "checkpoints" / f"step-0000000{step}")
        assert int(state["memory.pointer"]) == 16 * step % 40
        assert state["memory.queue"].shape == (6, 40)
        assert "optimizer.momentum_buffer.student.encoder.conv1.weight" in state


@pytest.mark.parametrize(
    "precision", ["float64", pytest.param("float32", marks=pytest.mark.one_backend)]
)
def test_resuming_is_exact(backend, backend_name, whole, tmp_path, precision):
    """The queue has gone round its end before the stop and goes round again after it."""
    key = f"precision={precision}"
    undisturbed = whole if precision == "float64" else train(backend_name, tmp_path / "a", key)
    train(backend_name, tmp_path / "b", key, "train.stop_at=4")
    train(backend_name, tmp_path / "b", key, resume="auto")
    assert kills.compare(undisturbed, tmp_path / "b") == []


def test_another_framework_goes_on_with_the_same_queue(
    backend, backend_name, whole, tmp_path, monkeypatch
):
    """Three steps in NumPy, the rest in the backend: the curve of the backend alone."""
    load = backends.load
    monkeypatch.setattr(backends, "load", lambda name: reference)
    train(backend_name, tmp_path, "precision=float64", "train.stop_at=3")
    monkeypatch.setattr(backends, "load", load)
    train(backend_name, tmp_path, "precision=float64", resume="auto")
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-10)


def test_a_lost_queue_would_show(backend, backend_name, whole, tmp_path):
    """The same with a queue of zeros and the pointer at the start."""
    changed = spec("precision=float64")
    _, state = checkpoint.read(whole / "checkpoints" / "step-00000003")
    found = []
    for queue in (state["memory.queue"], np.zeros_like(state["memory.queue"])):
        engine = backend.build(changed, {n: a for n, a in state.items() if "optimizer" not in n})
        engine.import_state({**state, "memory.queue": queue})
        rng = np.random.default_rng(0)
        images = tuple(rng.standard_normal((16, 1, 8, 8), np.float32) for _ in range(2))
        batch = Batch(images, np.arange(16))
        hyper = Hyper(3, 0.05, 0.0, 0.99)
        values, _ = engine.loss_and_grads(batch, {"shuffle_perm": np.arange(16)}, hyper)
        found.append(float(values["loss"]))
    assert abs(found[0] - found[1]) > 1e-3
