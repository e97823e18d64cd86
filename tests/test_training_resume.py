"""Stop, kill, resume, move to another framework: real processes on every backend."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import requested
from support import kills
from support.data_specs import write_images
from support.double import TINY, tiny

from triptych import backends
from triptych.core import checkpoint
from triptych.core.cli import main
from triptych.core.errors import UserError
from triptych.core.evaluation import sharing
from triptych.core.parity.compare import compare
from triptych.core.runs.log import read_rows
from triptych.core.training import run

MID_EPOCH = 7
"""Of 89 steps per epoch, and between two checkpoints."""


def train(name: str, folder: Path, *overrides: str, resume: str | None = None) -> int | None:
    return run.train(tiny(*overrides), name, folder, resume=resume, say=lambda text: None)


def final_state(folder: Path) -> dict[str, np.ndarray]:
    return checkpoint.read(checkpoint.latest(folder, print))[1]


@pytest.fixture(scope="session")
def whole(backend, backend_name, tmp_path_factory):
    """An undisturbed run of each backend."""
    folder = tmp_path_factory.mktemp(backend_name)
    assert train(backend_name, folder) is None
    return folder


@pytest.mark.parametrize(
    "precision", ["float32", pytest.param("float64", marks=pytest.mark.one_backend)]
)
def test_resuming_in_the_middle_of_an_epoch_is_exact(backend, backend_name, tmp_path, precision):
    key = f"precision={precision}"
    assert train(backend_name, tmp_path / "a", key, "log.every=1") is None
    assert (
        train(backend_name, tmp_path / "b", key, "log.every=1", f"train.stop_at={MID_EPOCH}")
        is None
    )
    assert train(backend_name, tmp_path / "b", key, "log.every=1", resume="auto") is None
    assert kills.compare(tmp_path / "a", tmp_path / "b") == []


@pytest.mark.one_backend
def test_evaluating_changes_no_number(backend, backend_name, whole, tmp_path):
    assert train(backend_name, tmp_path, "evaluate.every=5", "evaluate.per_class=[]") is None
    expected, found = final_state(whole), final_state(tmp_path)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.one_backend
def test_workers_change_no_number(backend, backend_name, whole, tmp_path):
    assert train(backend_name, tmp_path, "data.workers=1") is None
    assert kills.compare(whole, tmp_path) == []


def test_a_run_goes_on_in_another_framework(backend, backend_name, tmp_path):
    """The next backend under test takes over in the middle; where there is one, it alone."""
    names = requested() or backends.installed()
    other = names[(names.index(backend_name) + 1) % len(names)]
    keys = ["precision=float64", "log.every=1"]
    assert train(backend_name, tmp_path / "whole", *keys) is None
    assert train(backend_name, tmp_path / "a", *keys, f"train.stop_at={MID_EPOCH}") is None
    assert train(other, tmp_path / "b", *keys, resume=str(tmp_path / "a")) is None
    differences, _ = compare(record(tmp_path / "b"), record(tmp_path / "whole"))
    assert [d for d in differences if not d.ok] == []
    # Without the noise there is enough left to compare, and a wrong moment would be seen.
    assert sum("exp_avg_sq" in d.name for d in differences) > 20
    spoilt = record(tmp_path / "b")
    spoilt["state/optimizer.exp_avg.student.predictor.0.weight/step1"] *= 1 + 1e-6
    differences, _ = compare(spoilt, record(tmp_path / "whole"))
    assert [d.name for d in differences if not d.ok] == [
        "state/optimizer.exp_avg.student.predictor.0.weight/step1"
    ]
    assert json.loads((tmp_path / "b" / "result.json").read_text())["backend"] == other


def record(folder: Path) -> dict[str, np.ndarray]:
    """A run as ``parity.compare`` wants it, the second moments in the place of gradients."""
    found = {"loss": np.array([row["loss"] for row in read_rows(folder / "metrics.jsonl")])}
    for name, array in final_state(folder).items():
        found[f"state/{name}/step1"] = array
        if name.startswith(MOMENT):
            found[f"grad/{name.removeprefix(MOMENT)}/step0"] = np.sqrt(array)
    return found


MOMENT = "optimizer.exp_avg_sq."


@pytest.mark.one_backend
def test_a_signal_saves_and_leaves_with_its_status(backend, backend_name, whole, tmp_path):
    interrupt(backend_name, tmp_path, signal.SIGTERM, SLOW)
    assert train(backend_name, tmp_path, resume="auto") is None
    expected, found = final_state(whole), final_state(tmp_path)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.soak)]
)
def test_so_do_others_to_all_processes_of_a_terminal(tmp_path, number):
    interrupt("torch", tmp_path, number, NUMPY + SLOW, "data.workers=1")


def interrupt(name: str, folder: Path, number: int, code: str, *overrides: str) -> None:
    """Sends a signal in the middle of a run and checks how it leaves."""
    arguments = ["train", "-c", "moco_v3/digits", "--backend", name, "--output", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "-o", *TINY, "log.every=1", *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that run in the background may ignore it, and what is ignored stays so.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    wait_for(lambda: rows(folder) >= 2 or process.poll() is not None)
    os.killpg(process.pid, number)  # as a terminal and a launcher do: the workers get it, too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "saving after this step" in errors
    assert "Traceback" not in errors
    manifest, _ = checkpoint.read(checkpoint.latest(folder, print))
    assert manifest.step == rows(folder) < 12


NUMPY = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from support.double import load
from triptych import backends
backends.load = load
"""
"""Puts the reference engine in the place of every backend."""

SLOW = """
import sys, time
from triptych.core.training import trainer
from triptych.core.cli import main
honest = trainer.Trainer._advance
def slowly(self, batch):
    time.sleep(0.3)
    return honest(self, batch)
trainer.Trainer._advance = slowly
sys.exit(main(sys.argv[1:]))
"""
"""The command line with steps long enough to be interrupted."""


def rows(folder: Path) -> int:
    return len(read_rows(folder / "metrics.jsonl"))


def wait_for(condition, limit=120.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_a_poisoned_weight_is_named_with_status_3(
    backend, backend_name, tmp_path, monkeypatch, capsys
):
    bad = "student.encoder.blocks.0.mlp.fc1.weight"

    def build(spec, state, ranks):
        return backend.build(spec, {**state, bad: np.full_like(state[bad], np.nan)}, ranks)

    module = type("Poisoned", (), {**vars(backend), "build": staticmethod(build)})
    monkeypatch.setattr(backends, "load", lambda name: module)
    arguments = ["train", "-c", "moco_v3/digits", "--backend", backend_name, "-o", *TINY]
    assert main([*arguments, "--output", str(tmp_path)]) == 3
    errors = capsys.readouterr().err
    assert errors.startswith("error: step 1: the loss is not finite; first bad tensor: " + bad)
    assert "no checkpoint yet" in errors
    assert len(errors.splitlines()) == 1


def test_a_checkpoint_of_another_architecture_is_refused(backend, backend_name, whole, tmp_path):
    with pytest.raises(UserError, match=r"model\.width"):
        train(backend_name, tmp_path, "model.width=16", resume=str(whole))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["device=cuda:63", "precision=tf32"])
def test_what_the_device_cannot_do_is_refused_before_anything_is_written(
    backend, backend_name, tmp_path, key
):
    with pytest.raises(UserError, match=key.partition("=")[0]):
        train(backend_name, tmp_path / "new", key)
    assert not (tmp_path / "new").exists()


def test_a_batch_of_damaged_images_is_no_batch(backend, backend_name, tmp_path, monkeypatch):
    """The last two of the six held-out images would be a batch of their own."""
    monkeypatch.setattr(sharing, "BATCH", 2)
    for half, count in (("train", 8), ("val", 3)):
        write_images(tmp_path / half, [f"{c}/{i}.png" for c in "ab" for i in range(count)])
    for name in ("2", "1"):
        (tmp_path / "val" / "b" / f"{name}.png").write_text("broken")
    roots = [f"data.root={tmp_path / 'train'}", f"data.eval_root={tmp_path / 'val'}"]
    keys = ["data.name=image_folder", "data.on_error=skip", "evaluate.every=2", "train.steps=2"]
    keys += ["optim.warmup_steps=0", "evaluate.k=16"]
    assert train(backend_name, tmp_path / "run", *roots, *keys) is None
    (row,) = json.loads((tmp_path / "run" / "result.json").read_text())["evaluations"]
    assert (row["queries"], row["skipped"]) == (4, 2)
    assert 0 <= row["top1"] <= 1


@pytest.mark.one_backend
def test_eval_knn_repeats_what_training_found(backend, backend_name, tmp_path, capsys):
    keys = ["evaluate.every=12", "evaluate.per_class=[5]"]
    assert train(backend_name, tmp_path, *keys) is None
    capsys.readouterr()
    arguments = ["-c", "moco_v3/digits", "--backend", backend_name, "-o", *TINY, *keys]
    assert main(["eval", "knn", *arguments, "--weights", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    logged = [row for row in read_rows(tmp_path / "metrics.jsonl") if "eval" in row]
    assert [row.pop("time") > 0 for row in logged] == [True, True]
    assert found == logged
    assert main(["eval", "knn", *arguments, "--weights", str(tmp_path), "--branch", "teacher"]) == 0
    assert "teacher cls" in capsys.readouterr().out


# ------------------------------------------------------------------------------ kill -9


def test_compare_sees_one_changed_bit_and_one_changed_row(tmp_path):
    from triptych.core.files.writing import write_atomically

    def write(folder: Path, value: float, loss: float, step: int = 3) -> None:
        state = {"student.a": np.array([1.0, value]), "student.b": np.zeros((), np.int64)}
        folder.mkdir()
        checkpoint.write(folder, step, state, tiny(), {}, keep=1)
        row = {"step": step, "loss": loss, "chance": 1.0, "feature_std": 1.0, "time": value}
        text = json.dumps({**row, "images_per_second": value})
        write_atomically(folder / "metrics.jsonl", text + "\n")

    write(tmp_path / "a", 2.0, 1.0)
    write(tmp_path / "bit", np.nextafter(2.0, 3.0), 1.0)
    write(tmp_path / "row", 2.0, 1.5)
    write(tmp_path / "step", 2.0, 1.0, step=4)
    (tmp_path / "nothing").mkdir()
    assert kills.compare(tmp_path / "a", tmp_path / "a") == []
    assert kills.compare(tmp_path / "a", tmp_path / "bit") == ["student.a: differs"]
    assert (
        "instead of {'step': 3, 'loss': 1.0, 'chance': 1.0, 'feature_std': 1.0}"
        in kills.compare(tmp_path / "a", tmp_path / "row")[0]
    )
    assert kills.compare(tmp_path / "a", tmp_path / "step")[0] == "step 4 instead of 3"
    assert "step 0 instead of 3" in kills.compare(tmp_path / "a", tmp_path / "nothing")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_kills_change_no_bit(backend, backend_name, tmp_path):
    assert kills.main(["--backend", backend_name, "--output", str(tmp_path)]) == 0


def test_a_few_kills_of_the_numpy_engine_change_no_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kills, "MAIN", NUMPY + kills.MAIN)
    monkeypatch.setattr(kills, "SMALL", (*TINY, "log.every=1", "checkpoint.every=3"))
    arguments = ["--backend", "torch", "--steps", "26", "--kills", "2", "--seed", "1"]
    assert kills.main([*arguments, "--workers", "1", "--output", str(tmp_path)]) == 0
    assert "bit-identical" in capsys.readouterr().out


@pytest.mark.soak
def test_the_soak_sees_a_run_that_does_not_repeat(tmp_path, monkeypatch, capsys):
    """Weights that depend on the process, as those of a forgotten generator would."""
    careless = """
import os
from triptych.core.training import run
honest = run.open_engine
def build(*arguments, **options):
    engine = honest(*arguments, **options)
    engine.model.values["student.encoder.norm.weight"] += os.getpid() * 1e-12
    return engine
run.open_engine = build
"""
    monkeypatch.setattr(kills, "MAIN", NUMPY + careless + kills.MAIN)
    monkeypatch.setattr(kills, "SMALL", (*TINY, "log.every=1"))
    arguments = ["--backend", "torch", "--steps", "14", "--kills", "1", "--seed", "1"]
    assert kills.main([*arguments, "--workers", "0", "--output", str(tmp_path)]) == 1
    assert "student.encoder.norm.weight: differs" in capsys.readouterr().out
