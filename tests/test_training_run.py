"""Runs on a real NumPy engine: when they stop, how they go on, and what they never overwrite."""

import json
import os
import signal
import time
import weakref

import pytest
from support.double import finished, install, saved, tiny
from support.kills import compare

from triptych.core import reference
from triptych.core.data.digits import digits
from triptych.core.data.open import SOURCES, Splits
from triptych.core.errors import DeviceError, UserError
from triptych.core.evaluation import neighbours
from triptych.core.files.writing import occupied
from triptych.core.runs.log import read_rows
from triptych.core.training import run, trainer

pytestmark = pytest.mark.usefixtures("numpy_backend")


# -------------------------------------------------------------------------------- stop and go on


@pytest.mark.parametrize("stop_at", [5, pytest.param(11, marks=pytest.mark.soak)])
def test_stopping_changes_no_schedule_and_resuming_no_number(whole, tmp_path, stop_at):
    finished(tiny(f"train.stop_at={stop_at}", "log.every=3"), tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == stop_at
    finished(tiny(), tmp_path, resume="auto")
    extra = f"metrics.jsonl: {6} rows instead of 5"  # the row of the stop itself
    assert [d for d in compare(whole, tmp_path) if "instead of {" not in d] == [extra]
    last = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert last["loss"] == read_rows(whole / "metrics.jsonl")[-1]["loss"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_is_resumed(whole, tmp_path, monkeypatch, number):
    honest = trainer.Trainer._advance

    def signalled(self, batch):
        if self.step == 6:
            os.kill(os.getpid(), number)
        return honest(self, batch)

    monkeypatch.setattr(trainer.Trainer, "_advance", signalled)
    assert run.train(tiny(), "torch", tmp_path) == number
    assert saved(tmp_path)[-1] == "step-00000007"
    assert not (tmp_path / "result.json").exists()
    monkeypatch.undo()
    install(monkeypatch)
    finished(tiny(), tmp_path, resume="auto")
    assert compare(whole, tmp_path) == []


def test_an_evaluation_that_a_signal_put_off_is_made_up_for(tmp_path, monkeypatch):
    stopping = lambda self, stop: signal.SIGTERM if self.step == 6 else 0  # noqa: E731
    monkeypatch.setattr(trainer.Trainer, "_stopping", stopping)
    spec = tiny("evaluate.every=6")
    assert run.train(spec, "torch", tmp_path) == signal.SIGTERM
    monkeypatch.undo()
    install(monkeypatch)
    finished(spec, tmp_path, resume="auto")
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "eval" in row]
    assert [row["step"] for row in rows] == [6, 6, 12, 12]


@pytest.mark.parametrize("place", [pytest.param("embed", marks=pytest.mark.soak), "classify"])
def test_a_signal_breaks_an_evaluation_off_which_is_then_repeated(tmp_path, monkeypatch, place):
    spec = tiny("evaluate.every=6", "evaluate.per_class=[5]")
    whole = finished(spec, tmp_path / "whole")
    calls = []
    owner, name = {
        "embed": (reference.Engine, "embed"),
        "classify": (neighbours, "largest"),
    }[place]
    honest = getattr(owner, name)

    def signalled(*arguments, **options):
        calls.append(place)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return honest(*arguments, **options)

    monkeypatch.setattr(owner, name, signalled)
    folder = tmp_path / "run"
    assert run.train(spec, "torch", folder) == signal.SIGUSR1
    assert len(calls) == 2, "no batch more"
    assert saved(folder)[-1] == "step-00000006"
    assert not any("eval" in row for row in read_rows(folder / "metrics.jsonl"))
    monkeypatch.undo()
    install(monkeypatch)
    finished(spec, folder, resume="auto")
    assert compare(whole, folder) == []


def test_a_signal_in_the_first_evaluation_elsewhere_finds_its_state_saved(tmp_path, monkeypatch):
    """The evaluation that a run in another folder has left to be made."""
    spec = tiny("evaluate.every=6")
    monkeypatch.setattr(run, "_evaluate", lambda *_: [])
    finished(tiny("evaluate.every=6", "train.stop_at=6"), tmp_path / "a")

    def stopped(engine, split, terminal, step, check):
        os.kill(os.getpid(), signal.SIGTERM)
        check()

    monkeypatch.setattr(run, "_evaluate", stopped)
    resume = str(tmp_path / "a")
    assert run.train(spec, "torch", tmp_path / "b", resume=resume) == signal.SIGTERM
    assert saved(tmp_path / "b") == ["step-00000006"]


def test_an_evaluation_that_was_made_is_not_repeated(tmp_path):
    finished(tiny("evaluate.every=6", "train.stop_at=6"), tmp_path)
    finished(tiny("evaluate.every=6"), tmp_path, resume="auto")
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "eval" in row]
    assert [row["step"] for row in rows] == [6, 6, 12, 12]


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
    row = {"step": 1, "loss": 1.0, "chance": 1.0, "feature_std": 1.0, "time": 0.0}
    line = json.dumps(row).encode()
    path.write_bytes(line + b"\n\0\0\0\n" + line + b"\n")
    assert read_rows(path) == [row]
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


def test_another_device_and_another_way_to_compute_on_it_are_said(tmp_path, monkeypatch):
    card = {"device": "NVIDIA H100", "cuda": "12.6", "tf32": "off", "deterministic": "yes"}
    said = []

    def go_on(stop_at, compute):
        monkeypatch.setattr(reference, "compute", lambda spec: compute)
        said.clear()
        deterministic = f"deterministic={str(compute.get('deterministic') == 'yes').lower()}"
        keys = (f"train.stop_at={stop_at}", deterministic)
        finished(tiny(*keys), tmp_path, resume="auto", say=said.append)
        return [line.partition(" wrote ")[0] for line in said if line.startswith("warning")]

    assert go_on(2, {"device": "cpu"}) == []
    assert go_on(4, card) == ["warning: device: cpu"]
    assert go_on(6, card) == []
    assert go_on(8, {**card, "cuda": "13.0", "deterministic": "no"}) == [
        "warning: cuda: 12.6",
        "warning: deterministic: yes",
    ]
    assert (
        "warning: deterministic: yes wrote this checkpoint, no goes on: results may differ in the "
        "last digits"
    ) in said
    assert go_on(10, {"device": "cpu"}) == ["warning: device: NVIDIA H100"]


FULL = "device: cuda:0 is full; use train.batch_size=8"


def full_at(monkeypatch, step):
    """The device has no memory for ``step`` (1-based)."""
    honest = reference.Engine._differentiate

    def differentiate(self, batch, draws, hyper, **options):
        if hyper.step + 1 == step:
            raise DeviceError(FULL)
        return honest(self, batch, draws, hyper, **options)

    monkeypatch.setattr(reference.Engine, "_differentiate", differentiate)


@pytest.mark.parametrize(
    ("step", "more"),
    [
        (1, ""),
        (5, "; last checkpoint: {0}/checkpoints/step-00000004"),
        (7, "; saved in {0}/checkpoints/step-00000006"),
    ],
)
def test_a_full_device_costs_no_trained_step(tmp_path, monkeypatch, step, more):
    full_at(monkeypatch, step)
    with pytest.raises(UserError) as caught:
        run.train(tiny(), "torch", tmp_path)
    assert str(caught.value) == f"{FULL}{more.format(tmp_path)}"
    assert step == 1 or saved(tmp_path) == [f"step-{n:08d}" for n in (4, 6) if n < step]
    monkeypatch.undo()
    install(monkeypatch)
    said = []
    finished(tiny(), tmp_path, resume="auto", say=said.append)
    assert any("the device broke off the step after" in line for line in said) == (step == 7)
    assert any("resuming from" in line for line in said) == (step > 1)


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
    def refuse(spec, state, ranks):
        raise UserError("precision: none of that here")

    monkeypatch.setattr(reference, "build", refuse)
    refused("none of that", tiny(), "torch", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_state_of_the_start_is_not_kept_beside_the_engine(tmp_path, monkeypatch):
    honest, references, alive = run.find_start, [], []

    def watched(*arguments):
        begin, state = honest(*arguments)
        references.extend(map(weakref.ref, state.values()))
        return begin, state

    def count(self):
        alive.append(sum(reference() is not None for reference in references))
        return signal.SIGTERM

    monkeypatch.setattr(run, "find_start", watched)
    monkeypatch.setattr(trainer.Trainer, "fit", count)
    run.train(tiny(), "torch", tmp_path)
    assert len(references) > 20 and alive == [0]


def test_an_evaluation_without_labelled_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "digits", lambda data, how, _: Splits(digits(how)[0], None))
    refused("set data.eval_root", tiny("evaluate.every=5"), "torch", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_default_output():
    assert str(run.default_output("moco_v3/digits", "torch")) == "runs/moco_v3-digits-torch"
