"""Finds where a run begins: at the initial weights, or at a checkpoint that fits the run."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core import checkpoint, formats
from triptych.core.checkpoint import Manifest
from triptych.core.checkpoint.retrieval import FOLDER, MANIFEST, listed, step_of
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.formats.containers import is_foreign_folder
from triptych.core.formats.moments import STEP
from triptych.core.optim import scaling

Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        step: number of updates behind the state.
        path: the checkpoint of the state, or None for initial weights and files of other systems.
        before: the folder of the checkpoint's run, if that is another run.
        seconds: training time so far.
        evaluating: time of the evaluations so far, seconds.
        whole: whether the state has the entries of the optimizer.
        foreign: number of these updates that another system did, in no time of this run.
    """

    step: int = 0
    path: Path | None = None
    before: Path | None = None
    seconds: float = 0.0
    evaluating: float = 0.0
    whole: bool = False
    foreign: int = 0


def find_start(
    spec: RunSpec,
    run_dir: Path,
    resume: str | None,
    stamp: Mapping[str, Any],
    say: Say,
    steps_per_epoch: int = 0,
) -> tuple[Start, State]:
    """Finds where a run in ``run_dir`` begins, and its first state. Writes nothing.

    Args:
        resume: "auto", the path of a checkpoint or a run, a file or folder of another system, or
            None for a fresh run.
        stamp: the new process's values of what checkpoints store, such as versions.
        say: called with a warning for each difference from the checkpoint.
        steps_per_epoch: number of full batches in one pass over the data; 0: not known.

    Raises:
        UserError: the folder already holds a run, or the checkpoint is damaged or of another spec.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--output {run_dir}: is a file; give a folder")
    saved = listed(run_dir / FOLDER)
    if resume is None:
        if saved:
            raise UserError(
                f"{run_dir}: holds a run, saved up to {saved[0].name}; go on with --resume auto, "
                "or give another --output"
            )
        return Start(), formats.initial_state(spec, say)
    if resume != "auto" and _is_foreign(Path(resume)):
        if saved:
            raise UserError(
                f"--resume {resume}: {run_dir} holds {saved[0].name}, which is not to be "
                "overwritten; give another --output"
            )
        return _from_elsewhere(Path(resume), spec, steps_per_epoch, say)
    path = checkpoint.resolve(resume, run_dir, say)
    if path is None:
        say(f"--resume auto: nothing saved in {run_dir}, starting from the beginning")
        return Start(), formats.initial_state(spec, say)
    before = path.resolve().parent.parent
    elsewhere = before != run_dir.resolve()
    if saved and resume != "auto" and (elsewhere or step_of(saved[0]) > step_of(path)):
        raise UserError(
            f"--resume {resume}: {run_dir} holds {saved[0].name}, which is not to be overwritten; "
            "give another --output"
        )
    manifest, state = checkpoint.read(path)
    for warning in [*checkpoint.check_spec(manifest, spec), *_differences(manifest, stamp)]:
        say(f"warning: {warning}")
    say(f"resuming from {path} ({manifest.extra.get('backend')}, step {manifest.step})")
    seconds, evaluating = (
        float(manifest.extra.get(name, 0.0)) for name in ("seconds", "evaluate_seconds")
    )
    run, foreign = before if elsewhere else None, int(manifest.extra.get("foreign", 0))
    return Start(manifest.step, path, run, seconds, evaluating, True, foreign), state


def _is_foreign(path: Path) -> bool:
    """Whether a path is no checkpoint of a run here: another system's, or a converted one."""
    if (path / MANIFEST).is_file():
        return "converted" in checkpoint.verify(path).extra
    return path.is_file() or (path.is_dir() and is_foreign_folder(path))


def _from_elsewhere(
    path: Path, spec: RunSpec, steps_per_epoch: int, say: Say
) -> tuple[Start, State]:
    """A run that goes on from a file of another system.

    Its place in the schedules is the optimizer's number of updates, or the number of epochs that
    the file holds.
    """
    state, about, epochs = formats.read_training(path, spec, say)
    whole = any(name.startswith("optimizer.") for name in state)
    step = scaling.steps_behind(state)
    if not step and epochs and steps_per_epoch:
        step = epochs * steps_per_epoch
        state[STEP] = np.asarray(step, np.int64)
    if whole:
        none = {STEP: np.zeros((), np.int64)}
        state = scaling.fitted({**none, **state}, spec.precision)
    known = f"step {step}" if step else "step 0, since the file holds no number of updates"
    say(f"going on from {path} ({about}), {known}; the order of the images is that of this run")
    if not whole:
        say(f"warning: {path}: holds no state of an optimizer; it begins anew")
    return Start(step, whole=whole, foreign=step), state


def _differences(manifest: Manifest, stamp: Mapping[str, Any]) -> list[str]:
    """A line for each difference from the checkpoint's process that may change numbers."""
    lines = checkpoint.stamp_warnings(manifest, {**checkpoint.versions(), **stamp["versions"]})
    then = {name: manifest.extra.get(name, stamp[name]) for name in ("backend", "threads", "data")}
    if then["threads"] != stamp["threads"] and then["backend"] == stamp["backend"]:
        lines.append(
            f"{then['threads']} threads wrote this checkpoint, {stamp['threads']} go on: results "
            "may differ in the last digits"
        )
    lines += [
        f"{name}: {old} wrote this checkpoint, {new} goes on: results may differ in the last digits"
        for name, old, new in _changed(manifest.extra.get("compute", {}), stamp["compute"])
        if name == "device" or then["backend"] == stamp["backend"]
    ]
    if manifest.extra.get("broken_off"):
        lines.append(
            "the device broke off the step after this checkpoint: running statistics and teacher "
            "already include its batch, and will include it twice"
        )
    if then["data"] != stamp["data"]:
        lines.append("the training images are not those that the run began with")
    return lines


def _changed(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(name, old value, new value) of the names that both have, with different values."""
    return ((name, then[name], now[name]) for name in now if then.get(name, now[name]) != now[name])
