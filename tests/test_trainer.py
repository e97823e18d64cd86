"""The loop on a real NumPy engine: what it writes, when it stops, and what it never overwrites."""

import json
import math
import os
import signal
import time

import numpy as np
import pytest
from double import TINY, ahead, load, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from triptych import backends
from triptych.core import checkpoint, reference, run, trainer
from triptych.core.config.spec import RunSpec
from triptych.core.errors import NonFiniteError, UserError
from triptych.core.files import occupied
from triptych.core.health import STATES
from triptych.core.logs import Logs, read_rows
from triptych.core.plan import Plan
from triptych.core.signals import stop_request
from triptych.core.soak import compare
from triptych.core.terminal import evaluation_line, health_line


@pytest.fixture(autouse=True)
def numpy_backend(monkeypatch):
    monkeypatch.setattr(backends, "load", load)
    for variable in run.THREAD_VARIABLES:
        monkeypatch.setenv(variable, "1")  # and so restored, whatever a run sets


@pytest.fixture
def whole(tmp_path_factory):
    """An undisturbed run."""
    return finished(tiny(), tmp_path_factory.mktemp("whole"))


def finished(spec: RunSpec, folder, **options):
    assert run.train(spec, "torch", folder, **options) is None
    return folder


def poison_at(monkeypatch, step, value=np.nan, engine=reference.Engine):
    """From ``step`` (1-based) on, one weight is not finite before the forward pass."""
    honest = engine._differentiate

    def poisoned(self, batch, draws, hyper):
        if hyper.step + 1 >= step:
            self.model.values["student.encoder.blocks.0.norm1.weight"][3] = value
        return honest(self, batch, draws, hyper)

    monkeypatch.setattr(engine, "_differentiate", poisoned)


# --------------------------------------------------------------------------------- what is written


def test_rows(whole):
    rows = read_rows(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 3, 6, 9, 12]
    spec = tiny()
    plan = Plan(spec, 1437 // 16)
    for row in rows:
        hyper = plan.hyper(row["step"] - 1)
        assert (row["lr"], row["weight_decay"], row["ema"]) == (
            hyper.lr,
            hyper.weight_decay,
            hyper.ema,
        )
        assert row["chance"] == pytest.approx(4 * 0.2 * math.log(16))
        assert row["epoch"] == row["step"] / plan.steps_per_epoch
        assert row["loss"] == pytest.approx(row["loss_q1k2"] + row["loss_q2k1"])
        assert row["state"] in STATES
        assert 0 < row["feature_std"] <= 1
        assert row["gradient_norm"] > 0
        assert row["images_per_second"] > 0
        assert 0 <= row["data_wait"] <= 1


def test_result(whole):
    result = json.loads((whole / "result.json").read_text())
    rows = read_rows(whole / "metrics.jsonl")
    assert result["backend"] == "torch"
    assert result["versions"] == reference.versions()
    assert result["steps"] == 12
    assert (result["first_loss"], result["last_loss"]) == (rows[0]["loss"], rows[-1]["loss"])
    assert result["evaluations"] == []
    assert result["seconds"] > 0
    assert result["images_per_second"] == pytest.approx(12 * 16 / result["seconds"])
    assert (result["seed"], result["spec_hash"]) == (0, run.spec_hash(tiny()))


def test_spec_hash_sees_all_but_the_backend():
    assert run.spec_hash(tiny("backend=paddle")) == run.spec_hash(tiny())
    assert run.spec_hash(tiny("seed=1")) != run.spec_hash(tiny())


def test_checkpoints_are_kept_as_the_spec_says(tmp_path):
    finished(tiny("checkpoint.every=3", "checkpoint.keep=2"), tmp_path)
    assert saved(tmp_path) == ["step-00000009", "step-00000012"]
    finished(tiny("checkpoint.every=0"), tmp_path / "none")
    assert saved(tmp_path / "none") == ["step-00000012"]


def saved(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_resolved_spec_is_said_and_stored(tmp_path):
    said = []
    finished(tiny(), tmp_path, say=said.append)
    text = (tmp_path / "spec.yaml").read_text()
    assert text.rstrip() in said
    assert "backend: torch" in text


def test_evaluations(tmp_path):
    finished(tiny("evaluate.every=5", "evaluate.per_class=[10,1]"), tmp_path)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "eval" in row]
    assert [(row["step"], row["labels"]) for row in rows] == [
        (step, labels) for step in (5, 10, 12) for labels in ("all", 10, 1)
    ]
    assert [row["bank"] for row in rows[:3]] == [1437, 100, 10]
    assert [row["k"] for row in rows[:3]] == [20, 20, 10], "k is clipped to the bank, and told"
    assert rows[0]["top1"] > 0.3
    assert len({row["split"] for row in rows}) == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["evaluations"] == rows


def test_the_health_line():
    row = {
        **{"step": 120, "loss": 3.2134, "chance": 4.436, "state": "learning", "lr": 1e-3},
        **{"feature_std": 0.614, "gradient_norm": 1.234, "ema": 0.9912, "skipped": 2},
        **{"images_per_second": 811.7, "data_wait": 0.021},
    }
    assert health_line(row, 400) == (
        "step 120/400 loss 3.213 (chance 4.436) learning | feature std 0.61 | grad 1.23 | "
        "lr 1.0e-3 | ema 0.9912 | 812 img/s | data wait 2 % | 2 damaged files skipped"
    )


def test_the_evaluation_line():
    row = {
        **{"step": 5, "labels": 10, "top1": 0.83214, "k": 20, "temperature": 0.07, "bank": 100},
        **{"branch": "student", "tokens": "cls", "queries": 360},
    }
    assert evaluation_line(row) == (
        "step 5 k-NN top-1 83.21 % (10 labels per class, k 20, T 0.07, student cls, "
        "100 labelled, 360 queries)"
    )


@pytest.mark.parametrize("elsewhere", [False, True])
def test_tensorboard_events_are_the_rows_also_after_a_resume(tmp_path, elsewhere):
    keys = ["log.tensorboard=true", "log.every=1", "evaluate.every=6"]
    finished(tiny(*keys, "train.stop_at=7"), tmp_path / "a")
    # As a kill would leave it: events beyond the newest checkpoint.
    logs = Logs(tmp_path / "a", 7)
    logs.write({"step": 9, "loss": 99.0})
    logs.close()
    folder = tmp_path / ("b" if elsewhere else "a")
    finished(tiny(*keys), folder, resume=str(tmp_path / "a"))
    events = EventAccumulator(str(folder))
    events.Reload()
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval" not in row] == list(range(1, 13))
    for name in ("loss", "lr", "feature_std"):
        assert [(e.step, e.value, e.wall_time) for e in events.Scalars(name)] == [
            (row["step"], np.float32(row[name]), row["time"]) for row in rows if "eval" not in row
        ]
    assert [e.step for e in events.Scalars("knn/10/top1")] == [6, 7, 12]
    assert "time" not in events.Tags()["scalars"]


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_is_one_clear_line(tmp_path, tensorboard):
    logs = Logs(tmp_path, 0, tensorboard=tensorboard)
    logs.write({"step": 1, "loss": 1.0})
    with open("/dev/full", "w") as full:
        if tensorboard:
            logs._events._writer = full.buffer
        else:
            logs._file = full
        with pytest.raises(UserError, match="cannot write the log: No space left on device"):
            logs.write({"step": 2, "loss": 1.0})
        logs.close()


# -------------------------------------------------------------------------------- stop and go on


@pytest.mark.parametrize("stop_at", [5, 11])
def test_stopping_changes_no_schedule_and_resuming_no_number(whole, tmp_path, stop_at):
    finished(tiny(f"train.stop_at={stop_at}", "log.every=3"), tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == stop_at
    finished(tiny(), tmp_path, resume="auto")
    extra = f"metrics.jsonl: {6} rows instead of 5"  # the row of the stop itself
    assert [d for d in compare(whole, tmp_path) if "instead of {" not in d] == [extra]
    last = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert last["loss"] == read_rows(whole / "metrics.jsonl")[-1]["loss"]


def test_a_signal_finishes_the_step_saves_and_is_resumed(whole, tmp_path, monkeypatch):
    honest = trainer.Trainer._advance

    def signalled(self, batch):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, batch)

    monkeypatch.setattr(trainer.Trainer, "_advance", signalled)
    assert run.train(tiny(), "torch", tmp_path) == signal.SIGTERM
    assert saved(tmp_path)[-1] == "step-00000007"
    assert not (tmp_path / "result.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(backends, "load", load)
    finished(tiny(), tmp_path, resume="auto")
    assert compare(whole, tmp_path) == []


def test_an_evaluation_that_a_signal_put_off_is_made_up_for(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "_agreed", lambda self, stop: self.step == 6)
    spec = tiny("evaluate.every=6")
    assert run.train(spec, "torch", tmp_path) == signal.SIGTERM
    monkeypatch.undo()
    monkeypatch.setattr(backends, "load", load)
    finished(spec, tmp_path, resume="auto")
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "eval" in row]
    assert [row["step"] for row in rows] == [6, 6, 12, 12]


def test_an_evaluation_that_was_made_is_not_repeated(tmp_path):
    finished(tiny("evaluate.every=6", "train.stop_at=6"), tmp_path)
    finished(tiny("evaluate.every=6"), tmp_path, resume="auto")
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "eval" in row]
    assert [row["step"] for row in rows] == [6, 6, 12, 12]


def test_only_a_later_signal_ends_the_process(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    before = signal.getsignal(signal.SIGINT)
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        assert left == [], "launchers send the same request twice"
        stop.when = time.monotonic() - 10
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [128 + signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_drops_rows_of_lost_steps_and_torn_lines(whole, tmp_path):
    finished(tiny("train.stop_at=8"), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 99.0}\n{"step": 10, "lo')
    finished(tiny("log.every=1"), tmp_path, resume="auto")
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 3, 6, 8, 9, 10, 11, 12]
    assert rows[-1]["loss"] == read_rows(whole / "metrics.jsonl")[-1]["loss"]


def test_a_damaged_line_ends_the_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 3}\n')
    assert read_rows(path) == [{"step": 1}]
    assert read_rows(tmp_path / "none") == []


def test_a_run_that_goes_on_elsewhere_takes_its_log_along(whole, tmp_path):
    finished(tiny("train.stop_at=8"), tmp_path / "a")
    finished(tiny(), tmp_path / "b", resume=str(tmp_path / "a"))
    rows = [row["step"] for row in read_rows(tmp_path / "b" / "metrics.jsonl")]
    assert rows == [1, 3, 6, 8, 9, 12]
    assert saved(tmp_path / "a") == ["step-00000004", "step-00000008"], "left as it was"
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    assert result["first_loss"] == read_rows(whole / "metrics.jsonl")[0]["loss"]


def test_time_goes_on_after_a_resume(tmp_path):
    finished(tiny("train.stop_at=8"), tmp_path)
    before = json.loads((tmp_path / "result.json").read_text())["seconds"]
    finished(tiny(), tmp_path, resume="auto")
    after = json.loads((tmp_path / "result.json").read_text())["seconds"]
    assert after > before > 0


def test_resume_auto_with_nothing_saved_starts_and_says_so(whole, tmp_path):
    said = []
    finished(tiny(), tmp_path, resume="auto", say=said.append)
    assert any("nothing saved" in line for line in said)
    assert compare(whole, tmp_path) == []


def test_other_versions_threads_and_data_are_said(tmp_path, monkeypatch):
    finished(tiny("train.stop_at=8"), tmp_path)
    monkeypatch.setattr(run, "split_digest", lambda source: "other")
    monkeypatch.setattr(reference, "versions", lambda: {"numpy": "0.1"})
    said = []
    finished(tiny("threads=2"), tmp_path, resume="auto", say=said.append)
    warnings = "\n".join(line for line in said if line.startswith("warning"))
    assert "numpy" in warnings
    assert "1 threads wrote this checkpoint, 2 go on" in warnings
    assert "training images are not those" in warnings


# ------------------------------------------------------------------------------ never damaged


def refused(message, *arguments, **options):
    with pytest.raises(UserError, match=message) as caught:
        run.train(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_run_is_refused(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    refused("go on with --resume auto", tiny(), "torch", whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_an_older_checkpoint_does_not_overwrite_a_newer_one(whole):
    older = str(whole / "checkpoints" / "step-00000008")
    refused("step-00000012, which is not to be overwritten", tiny(), "torch", whole, resume=older)
    assert saved(whole) == ["step-00000004", "step-00000008", "step-00000012"]


def test_another_run_is_not_overwritten(whole, tmp_path):
    finished(tiny("train.stop_at=8"), tmp_path)
    refused("not to be overwritten", tiny(), "torch", whole, resume=str(tmp_path))


def test_a_changed_spec_is_refused(tmp_path):
    finished(tiny("train.stop_at=8"), tmp_path)
    refused("optim.lr", tiny("optim.lr=0.5"), "torch", tmp_path, resume="auto")


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").touch()
    refused("is a file", tiny(), "torch", tmp_path / "file")
    refused("cannot write", tiny(), "torch", tmp_path / "file" / "below")


def test_an_occupied_folder_is_refused(tmp_path):
    pid = os.fork()
    if pid == 0:
        with occupied(tmp_path):
            (tmp_path / "ready").touch()
            time.sleep(60)
    try:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        refused("another process is training there", tiny(), "torch", tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    finished(tiny("train.stop_at=1"), tmp_path)  # the lock went with its process


def test_nothing_is_written_before_everything_is_built(tmp_path, monkeypatch):
    def refuse(spec, state):
        raise UserError("precision: none of that here")

    monkeypatch.setattr(reference, "build", refuse)
    refused("none of that", tiny(), "torch", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_evaluation_without_labelled_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("triptych.core.evaluation.protocol.open_evaluation", lambda spec: None)
    refused("set data.eval_root", tiny("evaluate.every=5"), "torch", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PADDLE_TRAINERS_NUM"])
def test_several_processes_are_refused(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert run.choose_backend("torch", tiny()) == "torch"
    monkeypatch.setenv(variable, "2")
    with pytest.raises(UserError, match=f"{variable}=2: this version runs one process"):
        run.choose_backend("torch", tiny())


def test_the_choice_of_a_backend(monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda: ("oneflow", "paddle"))
    said = []
    assert run.choose_backend("torch", tiny("backend=paddle")) == "torch"
    assert run.choose_backend(None, tiny("backend=paddle")) == "paddle"
    assert run.choose_backend(None, tiny("threads=3"), said.append) == "oneflow"
    assert said == ["backend: oneflow, the first installed"]
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr(backends, "installed", lambda: ())
    with pytest.raises(UserError, match="pip install"):
        run.choose_backend(None, tiny())


def test_default_output():
    assert str(run.default_output("moco_v3/digits", "torch")) == "runs/moco_v3-digits-torch"


# ---------------------------------------------------------------------------------- not finite


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, value):
    poison_at(monkeypatch, 7, value)
    with pytest.raises(NonFiniteError) as caught:
        run.train(tiny(), "torch", tmp_path)
    message = str(caught.value)
    assert "step 7: " in message
    assert "first bad tensor: student.encoder.blocks.0.norm1.weight (1 of 8 values)" in message
    assert f"last good checkpoint: {tmp_path / 'checkpoints' / 'step-00000004'}" in message
    _, state = checkpoint.read(tmp_path / "checkpoints" / "step-00000004")
    assert all(np.isfinite(array).all() for array in state.values())


@pytest.mark.parametrize("step", [5, 8])
def test_a_device_that_runs_ahead_is_told_one_step_later(tmp_path, monkeypatch, step):
    """At step 8, where a checkpoint is due, nothing is saved: not even the check is late there."""
    monkeypatch.setattr(backends, "load", lambda name: ahead)
    poison_at(monkeypatch, step)
    done = []
    honest = reference.Engine.train_step
    monkeypatch.setattr(
        reference.Engine,
        "train_step",
        lambda self, batch, draws, hyper, monitor: (
            done.append(hyper.step + 1),
            honest(self, batch, draws, hyper, monitor=monitor),
        )[1],
    )
    with pytest.raises(NonFiniteError, match=rf"step {step}: loss is nan; first bad tensor"):
        run.train(tiny(), "torch", tmp_path)
    assert done[-1] == (step if step == 8 else step + 1)
    assert saved(tmp_path) == ["step-00000004"]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    """The loss of step 4 was fine, its update was not."""
    honest = reference.Engine.train_step

    def overflowing(self, batch, draws, hyper, *, monitor=False):
        metrics = honest(self, batch, draws, hyper, monitor=monitor)
        if hyper.step == 3:
            self.model.values["student.predictor.0.weight"][0, 0] = np.inf
        return metrics

    monkeypatch.setattr(reference.Engine, "train_step", overflowing)
    with pytest.raises(NonFiniteError, match=r"student.predictor.0.weight.*no checkpoint yet"):
        run.train(tiny(), "torch", tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_tiny_is_what_the_tests_above_take_it_for():
    assert "checkpoint.every=4" in TINY
    assert tiny().checkpoint.keep == 3
