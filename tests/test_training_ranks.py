"""Two processes of one run, on the NumPy engine: who writes, and how all of them end together."""

import errno
import json
import os
import signal

import numpy as np
import pytest
from support.double import Ahead, finished, install, saved
from support.kills import compare
from support.two_ranks import SHORT, Left, train_on_two

from triptych.core import checkpoint, config
from triptych.core.checkpoint import store
from triptych.core.commands import train
from triptych.core.contracts import Slot
from triptych.core.data import Pipeline
from triptych.core.errors import UserError
from triptych.core.evaluation import sharing
from triptych.core.runs.log import Logs, read_rows
from triptych.core.training import run, saving, trainer
from triptych.core.training.resume import find_start
from triptych.core.training.terminal import Terminal


@pytest.fixture(autouse=True)
def numpy_backend(monkeypatch):
    install(monkeypatch)


def damaged(*arguments, **options):
    raise UserError("photo.jpg: damaged")


def breaking_batches(stop):
    """The batches of the steps up to ``stop``, then an error."""
    whole = Pipeline.batches

    def batches(self, start, end):
        yield from whole(self, start, min(stop, end))
        damaged()

    return batches


def poison(step):
    """One weight is not finite in the forward pass of ``step`` (1-based) and later."""
    honest = Ahead._differentiate

    def differentiate(self, batch, draws, hyper, **options):
        if hyper.step + 1 >= step:
            self.model.values["student.encoder.blocks.0.norm1.weight"][3] = np.nan
        return honest(self, batch, draws, hyper, **options)

    return differentiate


def on(rank, place, name, value):
    """A change of the program in one process, or in both where ``rank`` is None."""

    def change(ranks):
        if rank in (None, ranks.rank):
            setattr(place, name, value)

    return change


def both(folder, *overrides, **options):
    """One run whose processes see the same folder."""
    return train_on_two(folder, [folder / "run"] * 2, *overrides, **options)


def told(left: list[Left], status: int) -> str:
    """The one line of error that two processes with this exit status have told."""
    assert [one.status for one in left] == [status, status], left
    lines = [line for one in left for line in one.err.splitlines() if line]
    assert len(lines) == 1, lines
    return lines[0]


# ------------------------------------------------------------------------------------- who writes


def test_only_the_main_rank_writes_and_speaks(tmp_path):
    outputs = [tmp_path / "main", tmp_path / "other"]
    main, other = train_on_two(tmp_path, outputs)
    assert (main.status, other.status) == (0, 0), main.err + other.err
    assert not outputs[1].exists()
    assert "step 6/6 loss" in main.out and "done after step 6" in main.out
    assert (main.err, other.out, other.err) == ("", "", "")
    alone = finished(config.load("moco_v3/digits", SHORT), tmp_path / "alone")
    assert compare(alone, outputs[0]) == []
    assert (outputs[0] / "result.json").exists()


def test_an_evaluation_is_written_once_and_made_up_for_by_both(tmp_path):
    """Only the main rank knows from its log that the evaluation of the last step is missing."""
    keys = ("evaluate.every=3", "evaluate.per_class=[5]")
    both(tmp_path, *keys, "train.stop_at=3", change=on(None, run, "_evaluate", lambda *_: []))
    left = both(tmp_path, *keys, resume="auto")
    assert [one.status for one in left] == [0, 0], left
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval" in row]
    assert [row["step"] for row in rows] == [3, 3, 6, 6]


# ------------------------------------------------------------------------------ how they all end


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(tmp_path, rank):
    honest = trainer.Trainer._advance

    def signalled(self, batch):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, batch)

    change = on(rank, trainer.Trainer, "_advance", signalled)
    left = both(tmp_path, "checkpoint.every=0", "log.every=5", change=change)
    assert "SIGTERM: saving after this step" in told(left, 128 + signal.SIGTERM)
    assert saved(tmp_path / "run") == ["step-00000003"]
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_signal_that_comes_to_one_rank_when_both_leave_changes_nothing(tmp_path):
    """A launcher sends SIGTERM to one process after the other, and repeats it."""
    advance, last_line = trainer.Trainer._advance, run._last_line

    def signalled(self, batch):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, batch)

    def late(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return last_line(*arguments)

    def change(ranks):
        if ranks.rank == 0:
            trainer.Trainer._advance = signalled
        run._last_line = late

    left = both(tmp_path, "checkpoint.every=0", "log.every=5", change=change)
    assert "SIGTERM: saving after this step" in told(left, 128 + signal.SIGTERM)
    assert "after step 3 of 6" in left[0].out
    assert saved(tmp_path / "run") == ["step-00000003"]


def test_a_signal_while_one_rank_evaluates_stops_both(tmp_path):
    def evaluate(engine, split, terminal, step, check):
        os.kill(os.getpid(), signal.SIGTERM)
        check()
        raise UserError("the evaluation went on")

    def change(ranks):
        run._evaluate = evaluate if ranks.rank == 1 else lambda *_: []

    left = both(tmp_path, "evaluate.every=3", "checkpoint.every=0", change=change)
    assert "SIGTERM" in told(left, 128 + signal.SIGTERM)
    assert saved(tmp_path / "run") == ["step-00000003"]


@pytest.mark.parametrize("rank", [0, 1, None])
def test_data_that_one_rank_cannot_read_end_both_with_the_state_saved(tmp_path, rank):
    change = on(rank, Pipeline, "batches", breaking_batches(3))
    newest = tmp_path / "run" / "checkpoints" / "step-00000003"
    line = told(both(tmp_path, change=change), 2)
    assert line == f"error: photo.jpg: damaged; saved in {newest}"
    assert saved(tmp_path / "run")[-1] == newest.name


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_loss_that_is_not_finite_on_one_rank_ends_both(tmp_path, rank):
    left = both(tmp_path, change=on(rank, Ahead, "_differentiate", poison(4)))
    line = told(left, 3)
    assert "error: step 4: loss is nan; first bad tensor by now: student.encoder" in line
    assert line.endswith("last good checkpoint: " + str(tmp_path / "run/checkpoints/step-00000002"))
    assert saved(tmp_path / "run") == ["step-00000002"]


CASES = {
    "the data of one rank are missing": (1, run, "_open_data", 0),
    "the main rank's folder is taken": (0, run, "occupied", 0),
    "an evaluation meets a damaged file": (1, run, "_evaluate", 3),
    "the log's disk is full": (0, Logs, "write", 0),
    "the disk of the checkpoints is full": (0, checkpoint, "write", 0),
    "the result cannot be written": (0, run, "_write_result", 6),
}
"""Rank, place and name of what fails there; the step whose checkpoint is the newest then."""


@pytest.mark.parametrize("case", CASES)
def test_what_fails_on_one_rank_ends_both(tmp_path, case):
    rank, place, name, step = CASES[case]
    keys = ["evaluate.every=3"] if name == "_evaluate" else []
    line = told(both(tmp_path, *keys, change=on(rank, place, name, damaged)), 2)
    assert line.startswith("error: photo")
    folder = tmp_path / "run" / "checkpoints"
    assert (max(folder.iterdir()).name if folder.exists() else "step-0")[-1] == str(step)


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device", "standard output")


def lose(self, text, *, news):
    if "step 3/6" in text:
        self.lost = OSError(errno.ENOSPC, "No space left on device", "standard output")


@pytest.mark.parametrize(
    ("place", "name", "value", "step"),
    [(run, "_headline", full_disk, None), (Terminal, "status", lose, "step-00000004")],
)
def test_a_standard_output_that_takes_no_more_ends_both(tmp_path, place, name, value, step):
    line = told(both(tmp_path, change=on(0, place, name, value)), 2)
    assert line == "error: standard output: No space left on device"
    folder = tmp_path / "run" / "checkpoints"
    assert (saved(tmp_path / "run")[-1] if folder.exists() else None) == step


def test_an_invalid_spec_is_refused_by_both(tmp_path):
    """Before they meet. A launcher would end one of them before it speaks: see test_launch."""
    for one in both(tmp_path, "train.batch_size=0"):
        assert one.status == 2 and one.err.startswith("error: -o train.batch_size=0: ")
        assert len(one.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_ranks_that_find_different_checkpoints_are_refused(tmp_path):
    outputs = [tmp_path / "main", tmp_path / "other"]
    assert [one.status for one in train_on_two(tmp_path, outputs, "train.stop_at=2")] == [0, 0]
    line = told(train_on_two(tmp_path, outputs, resume="auto"), 2)
    assert "process 1 of 2 finds step 0, another one step 2" in line


# ------------------------------------------------------------------------ two copies of the model

COPIES = ("parallel.data=2", "evaluate.every=3", "evaluate.per_class=[5]")


def rows_of(folder):
    """The rows of a log without what depends on the machine's load."""
    timed = ("images_per_second", "data_wait", "evaluate_share", "time")
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def assert_same_rows(found, wanted):
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        for key, value in other.items():
            same = pytest.approx(value, rel=1e-10) if isinstance(value, float) else value
            assert one[key] == same, key


def test_two_copies_log_and_save_what_one_process_does(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "BATCH", 37)  # so that the last round is one of one process
    left = both(tmp_path, *COPIES)
    assert [one.status for one in left] == [0, 0], left
    alone = finished(config.load("moco_v3/digits", [*SHORT, *COPIES[1:]]), tmp_path / "alone")
    assert_same_rows(rows_of(tmp_path / "run"), rows_of(alone))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [row["eval"] for row in result["evaluations"]] == ["knn"] * 4


def test_a_damaged_file_that_another_copy_meets_is_counted_and_named_once(tmp_path):
    def damage(ranks):
        skipped = ["photo.jpg"] if ranks.rank == 1 else []
        Pipeline.skipped = property(lambda self: skipped)

    main, other = both(tmp_path, COPIES[0], change=damage)
    assert main.out.count("damaged, skipped: photo.jpg") == 1 and not other.out
    assert [row["skipped"] for row in rows_of(tmp_path / "run")] == [1] * 6


def test_different_specs_are_refused_by_name(tmp_path):
    honest = config.load

    def change(ranks):
        if ranks.rank == 1:
            config.load = lambda name, keys: honest(name, [*keys, "seed=7", "optim.lr=0.5"])

    line = told(both(tmp_path, change=change), 2)
    assert line.startswith(
        "error: the 2 processes differ in seed (0 on process 0, 7 on process 1), optim.lr (0.002 "
        "on process 0, 0.5 on process 1); start all"
    )
    assert not (tmp_path / "run").exists()


def test_different_weights_are_refused_by_name(tmp_path):
    change = on(1, run, "find_start", other_start)
    line = told(both(tmp_path, change=change), 2)
    assert line.startswith("error: the 2 processes differ in weights that they begin with")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def other_start(*arguments, **options):
    """A start at the same step with other weights."""
    begin, state = find_start(*arguments, **options)
    return begin, {name: array + 1 for name, array in state.items()}


def test_different_versions_of_the_program_are_refused_by_name(tmp_path):
    change = on(1, run, "program_digest", lambda: "another version")
    line = told(both(tmp_path, change=change), 2)
    assert line.startswith("error: the 2 processes differ in version of the program; start all")
    assert not (tmp_path / "run").exists()


def test_a_state_that_processes_share_is_read_by_all_in_one_order(tmp_path):
    """The main rank streams it into a file; on a full disk the others do not wait for it."""

    def change(ranks):
        honest, order = Slot.__new__, []
        saving.divided = lambda engine: True

        def slot(kind, shape, read, write):
            def watched():
                ranks.mesh.strict = False  # the main rank reads where it writes
                order.append(ranks.largest(len(order)))  # meets all ranks
                ranks.mesh.strict = True
                return read()

            return honest(kind, shape, watched, write)

        Slot.__new__ = slot

    assert [one.status for one in both(tmp_path, "train.stop_at=2", change=change)] == [0, 0]
    assert saved(tmp_path / "run") == ["step-00000002"]

    def full(ranks):
        change(ranks)
        store.stream_safetensors = full_disk

    line = told(both(tmp_path, change=full, resume="auto"), 2)
    assert "No space left on device" in line and saved(tmp_path / "run") == ["step-00000002"]


def test_a_run_goes_on_with_another_number_of_copies(tmp_path):
    """Two copies for three steps, then one process: the state is that of one process alone."""
    assert [one.status for one in both(tmp_path, COPIES[0], "train.stop_at=3")] == [0, 0]
    spec = config.load("moco_v3/digits", SHORT)
    moved = finished(spec, tmp_path / "run", resume="auto")
    alone = finished(spec, tmp_path / "alone")
    found, wanted = (
        checkpoint.read(f / "checkpoints" / "step-00000006")[1] for f in (moved, alone)
    )
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        # The true gradients of the keys' third and of the last norm's bias are 0.
        if "qkv.bias" not in name and "encoder.norm.bias" not in name:
            np.testing.assert_allclose(found[name], array, rtol=1e-8, atol=1e-10, err_msg=name)


PROBE = (
    *("data.workers=0", "model.image_size=8", "model.width=8", "model.depth=1", "model.heads=2"),
    *("train.batch_size=10", "train.steps=4", "threads=1", "log.tensorboard=false", "log.every=1"),
    *(
        "method.features=cached",
        "evaluate.every=2",
        "train.drop_last=false",
        "optim.warmup_steps=0",
    ),
)


def probe(ranks):
    """Trains a probe on the features of a random encoder."""
    train.config.load = lambda name, keys: LOAD("moco_v3/digits_linear", PROBE + tuple(keys[-1:]))


LOAD = config.load


def test_two_copies_train_a_probe_on_cached_features(tmp_path):
    left = both(tmp_path, COPIES[0], change=probe)
    assert [one.status for one in left] == [0, 0], left
    assert "computing the features" in left[0].out and not left[1].out
    alone = finished(config.load("moco_v3/digits_linear", PROBE), tmp_path / "alone")
    assert_same_rows(rows_of(tmp_path / "run"), rows_of(alone))
