"""The loop on a real NumPy engine: what it writes, and what it does with a loss of nan."""

import errno
import json
import math
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from support.double import ahead, finished, install, saved, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from triptych import backends
from triptych.core import checkpoint, cli, config, reference
from triptych.core.contracts import Batch
from triptych.core.data import Pipeline
from triptych.core.errors import NonFiniteError, UserError
from triptych.core.methods.health import STATES
from triptych.core.optim.plan import Plan
from triptych.core.runs.log import Logs, read_rows
from triptych.core.training import run
from triptych.core.training.terminal import Terminal, health_line

pytestmark = pytest.mark.usefixtures("numpy_backend")


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


def test_the_resolved_spec_is_stored_and_its_place_said(tmp_path):
    said = []
    finished(tiny(), tmp_path, say=said.append)
    assert f"resolved spec: {tmp_path / 'spec.yaml'}" in said
    stored = config.load(tmp_path / "spec.yaml")
    assert stored == tiny("backend=torch")


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


def test_equal_images_are_a_collapse_whatever_rounding_makes_of_their_features(
    tmp_path, monkeypatch
):
    """A kernel that rounds the last row of a product otherwise, before a batch norm."""

    def black(self, start, stop):
        for batch in honest(self, start, stop):
            yield Batch(tuple(np.zeros_like(view) for view in batch.views), batch.index)

    honest = Pipeline.batches
    monkeypatch.setattr(Pipeline, "batches", black)
    monkeypatch.setattr("triptych.core.engine.feature_std", lambda features: 0.9)
    finished(tiny("log.every=1"), tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert {row["feature_std"] for row in rows} == {0.0}
    assert rows[-1]["state"] == "collapsed"


# ------------------------------------------------------------- what ends a run, its state saved


def breaking_batches(whole):
    """Batches that end with an error after step 7."""

    def breaking(self, start, stop):
        yield from whole(self, start, min(stop, 7))
        raise UserError("photo.jpg: damaged")

    return breaking


def test_data_that_cannot_be_read_end_the_run_with_its_state_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "batches", breaking_batches(Pipeline.batches))
    newest = tmp_path / "checkpoints" / "step-00000007"
    with pytest.raises(UserError, match=rf"photo.jpg: damaged; saved in {newest}"):
        run.train(tiny(), "torch", tmp_path)
    with pytest.raises(UserError, match=r"photo.jpg: damaged$"):
        run.train(tiny(), "torch", tmp_path, resume="auto")
    monkeypatch.undo()
    install(monkeypatch)
    finished(tiny(), tmp_path, resume="auto")


@pytest.mark.parametrize(
    "fault", [UserError, MemoryError, pytest.param(RuntimeError, marks=pytest.mark.soak)]
)
def test_an_evaluation_that_fails_comes_after_a_save(tmp_path, monkeypatch, fault):
    def breaking(*arguments):
        assert saved(tmp_path) == ["step-00000003"], "a crash of a framework costs nothing either"
        raise fault("photo.jpg: damaged")

    monkeypatch.setattr(run, "_evaluate", breaking)
    for _ in range(2):  # a resume meets the same file, and has nothing new to save
        with pytest.raises(fault, match=r"photo.jpg: damaged"):
            run.train(tiny("evaluate.every=3"), "torch", tmp_path, resume="auto")
        assert saved(tmp_path) == ["step-00000003"]
    monkeypatch.undo()
    install(monkeypatch)
    finished(tiny("evaluate.every=3"), tmp_path, resume="auto")
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("labels") == "all"] == [3, 6, 9, 12]


def test_an_evaluation_that_fails_names_the_saved_state(tmp_path, monkeypatch):
    def breaking(*arguments):
        raise UserError("photo.jpg: damaged")

    monkeypatch.setattr(run, "_evaluate", breaking)
    newest = tmp_path / "checkpoints" / "step-00000003"
    with pytest.raises(UserError, match=rf"photo.jpg: damaged; the state is saved in {newest}$"):
        run.train(tiny("evaluate.every=3"), "torch", tmp_path)


def test_the_rows_of_an_evaluation_are_written_at_once(tmp_path):
    """A kill between them would leave an evaluation that seems to be made."""
    logs = Logs(tmp_path, 0, tensorboard=False)
    written = []
    logs._file = SimpleNamespace(write=written.append, flush=lambda: None)
    logs.write({"step": 3, "eval": "knn"}, {"step": 3, "eval": "knn"})
    (text,) = written
    assert [json.loads(line)["step"] for line in text.splitlines()] == [3, 3]


def test_damaged_data_are_told_of_where_the_disk_is_full_as_well(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise UserError("cannot save")

    monkeypatch.setattr(Pipeline, "batches", breaking_batches(Pipeline.batches))
    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(UserError, match=r"photo\.jpg: damaged\ncannot save"):
        run.train(tiny("checkpoint.every=0"), "torch", tmp_path)


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "standard output"),
            2,
            "error: standard output: No space",
        ),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
    ],
)
def test_a_log_that_takes_no_more_ends_the_run_with_its_state_saved(
    tmp_path, monkeypatch, capfd, error, status, told
):
    def lose(self, text):
        if "step 6/12" in text:
            self.lost = error

    monkeypatch.setattr(Terminal, "line", lose)
    monkeypatch.setattr(Terminal, "status", lambda self, text, *, news: self.line(text))
    monkeypatch.setattr(cli, "_silence", lambda stream: None)
    assert cli.exit_status(lambda: run.train(tiny(), "torch", tmp_path) or 0) == status
    assert capfd.readouterr().err.startswith(told)
    assert saved(tmp_path)[-1] == "step-00000007"
    assert not (tmp_path / "result.json").exists()
    monkeypatch.undo()
    install(monkeypatch)
    finished(tiny(), tmp_path, resume="auto")


def test_a_terminal_that_cannot_be_written_is_lost(monkeypatch):
    terminal = Terminal(12)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        terminal.line("one")
        assert (terminal.lost.errno, terminal.lost.filename) == (errno.ENOSPC, "standard output")
        terminal.line("another")
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


def test_a_full_disk_behind_standard_output_is_one_clear_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "triptych.core.cli", "info", "-c", "moco_v3/digits"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("streams", "status"), [(">&-", 0), (">/dev/full 2>&1", 2), (">&- 2>&-", 0)]
)
def test_streams_that_are_closed_or_full_make_no_traceback(streams, status):
    command = f"{sys.executable} -m triptych.core.cli info -c moco_v3/digits {streams}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@pytest.mark.parametrize(
    "line",
    [
        "5",
        '{"step": 1}',
        '{"step": "x", "loss": 1}',
        '{"step": 3, "loss": "x", "chance": 1.0, "feature_std": 1.0, "time": 1.0}',
        '{"eval": "knn", "step": 3, "top1": 1.0}',
        "[" * 100_000,
    ],
)
def test_rows_end_before_a_damaged_line(whole, line):
    path = whole / "metrics.jsonl"
    rows = read_rows(path)
    path.write_text(path.read_text() + line + "\n" + json.dumps(rows[0]) + "\n")
    assert read_rows(path) == rows


# ---------------------------------------------------------------------------------- not finite


def poison_at(monkeypatch, step, value=np.nan, engine=reference.Engine):
    """From ``step`` (1-based) on, one weight is not finite before the forward pass."""
    honest = engine._differentiate

    def poisoned(self, batch, draws, hyper, **options):
        if hyper.step + 1 >= step:
            self.model.values["student.encoder.blocks.0.norm1.weight"][3] = value
        return honest(self, batch, draws, hyper, **options)

    monkeypatch.setattr(engine, "_differentiate", poisoned)


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
    assert not list((tmp_path / "checkpoints").iterdir())
