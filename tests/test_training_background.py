"""Checkpoints that are written while the run goes on (``checkpoint.background``)."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from support.double import finished, install, saved, tiny
from support.kills import compare
from support.processes import SILENT
from support.two_ranks import train_on_two
from test_training_trainer import poison_at

from triptych.core import checkpoint
from triptych.core.errors import NonFiniteError, UserError
from triptych.core.training import run, trainer

KEY = "checkpoint.background=true"


pytestmark = pytest.mark.usefixtures("numpy_backend")


def at(monkeypatch, step, do):
    """Calls a function at the begin of a step (1-based), before it is computed."""
    honest = trainer.Trainer._advance

    def advance(self, batch):
        if self.step + 1 == step:
            do(self)
        return honest(self, batch)

    monkeypatch.setattr(trainer.Trainer, "_advance", advance)


def writing(monkeypatch, before):
    """Calls a function with the step before each checkpoint is written, where that happens."""
    honest = checkpoint.write

    def write(run_dir, step, *arguments, **options):
        before(step)
        return honest(run_dir, step, *arguments, **options)

    monkeypatch.setattr(checkpoint, "write", write)


def test_the_run_goes_on_while_its_state_of_that_step_is_written(whole, tmp_path, monkeypatch):
    """The checkpoint of step 4 is held up until step 7 has been computed, and is that of step 4."""
    later, threads = threading.Event(), {}

    def before(step):
        threads[step] = threading.current_thread() is threading.main_thread()
        assert step != 4 or later.wait(SILENT)

    writing(monkeypatch, before)
    at(monkeypatch, 8, lambda trainer: later.set())
    finished(tiny(KEY), tmp_path)
    assert threads == {4: False, 8: False, 12: True}
    assert compare(whole, tmp_path) == []
    for name in saved(whole):
        states = [checkpoint.read(run / "checkpoints" / name)[1] for run in (whole, tmp_path)]
        assert states[0].keys() == states[1].keys()
        for key, array in states[0].items():
            np.testing.assert_array_equal(states[1][key], array, f"{name}: {key}")


def test_what_cannot_be_written_ends_the_run_at_the_next_save(tmp_path, monkeypatch):
    def before(step):
        if step == 8:
            raise UserError("no room")

    writing(monkeypatch, before)
    with pytest.raises(UserError, match=r"^no room$"):
        run.train(tiny(KEY), "torch", tmp_path)
    assert saved(tmp_path) == ["step-00000004"]


def test_an_error_leaves_nobody_writing(tmp_path, monkeypatch):
    """The next step fails while the checkpoint is being written; when the run has ended, it is."""
    writing(monkeypatch, lambda step: time.sleep(0.5))

    def fail(trainer):
        raise RuntimeError("a bug")

    at(monkeypatch, 5, fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run.train(tiny(KEY), "torch", tmp_path)
    assert saved(tmp_path) == ["step-00000004"]


def test_a_loss_of_nan_waits_for_the_last_good_checkpoint(tmp_path, monkeypatch):
    """It is being written when the loss is not finite, and it is the one that the error names."""
    poison_at(monkeypatch, 6)
    later = threading.Event()
    writing(monkeypatch, lambda step: later.wait(SILENT))
    honest = trainer.Background.finish

    def finish(self):
        later.set()
        return honest(self)

    monkeypatch.setattr(trainer.Background, "finish", finish)
    with pytest.raises(NonFiniteError, match=r"step 6: .*; last good checkpoint: .*00000004$"):
        run.train(tiny(KEY), "torch", tmp_path)
    assert saved(tmp_path) == ["step-00000004"]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    def spoil(trainer):
        trainer.engine.model.values["student.encoder.cls_token"][:] = np.inf

    honest = trainer.Trainer._save
    monkeypatch.setattr(
        trainer.Trainer,
        "_save",
        lambda self, **options: (self.step == 4 and spoil(self), honest(self, **options))[1],
    )
    with pytest.raises(NonFiniteError, match="no checkpoint yet"):
        run.train(tiny(KEY), "torch", tmp_path)
    assert not (tmp_path / "checkpoints").exists() or saved(tmp_path) == []


def test_a_signal_is_answered_by_a_whole_checkpoint(whole, tmp_path, monkeypatch):
    at(monkeypatch, 6, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    assert run.train(tiny(KEY), "torch", tmp_path) == signal.SIGTERM
    assert saved(tmp_path) == ["step-00000004", "step-00000006"]
    monkeypatch.undo()
    install(monkeypatch)
    finished(tiny(), tmp_path, resume="auto")
    assert compare(whole, tmp_path) == []


def test_two_processes_save_in_the_background(tmp_path):
    left = {
        key: train_on_two(tmp_path, [tmp_path / key] * 2, f"checkpoint.background={key}")
        for key in ("true", "false")
    }
    assert [one.status for pair in left.values() for one in pair] == [0] * 4, left
    assert saved(tmp_path / "true") == saved(tmp_path / "false")
    assert compare(tmp_path / "false", tmp_path / "true") == []
