"""Trains one spec on several backends, each in its own process, and compares the runs."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from triptych import backends
from triptych.core import config
from triptych.core.config.spec import RunSpec
from triptych.core.errors import UserError, printable
from triptych.core.evaluation import PROTOCOLS
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.subject import raw_pixels
from triptych.core.files.writing import write_atomically
from triptych.core.machine.devices import on_compared_device
from triptych.core.machine.signals import ENDINGS, heeded
from triptych.core.parameters import initial_state
from triptych.core.report import page, table
from triptych.core.runs.record import BASELINES, RunRecord, read_run
from triptych.core.runs.rows import Row


def run(
    path: str | Path,
    overrides: Sequence[str],
    names: Sequence[str] | None,
    output: Path,
    *,
    resume: str | None = None,
) -> int:
    """Trains on every backend, prints the table and writes ``report.html``.

    Args:
        path: the spec.
        overrides: KEY=VALUE pairs that override keys of the spec.
        names: backends; None: all installed backends.
        output: folder for the report and for one run directory per backend, named after it.
        resume: "auto": unfinished runs in ``output`` are resumed, finished ones left unchanged.

    Returns:
        The exit status, 0.

    Raises:
        UserError: as in ``choose``, or the spec is wrong, or a backend could not train.
    """
    names = choose(names)
    spec = on_compared_device(config.load(path, overrides))
    overrides = [*overrides, f"device={spec.device}"]
    for name in names if resume else ():
        _check_evaluation(output / name / "spec.yaml", spec)
    run_dirs = train_all(path, overrides, names, output, resume=resume)
    if spec.evaluate.every:
        add_baselines(spec, run_dirs)
    records = [read_run(run_dir) for run_dir in run_dirs]
    print_table(records)
    path = output / "report.html"
    page.write(records, path)
    print(f"report: {printable(str(path))}")
    return 0


def _check_evaluation(stored: Path, spec: RunSpec) -> None:
    """Raises UserError if a stored run was evaluated by other settings than the spec's.

    A finished run is not evaluated again, so its numbers could not be compared with new ones.
    """
    if not stored.exists():
        return
    # No run evaluates by the settings of low-shot classification.
    then, now = (s.evaluate.model_dump(exclude={"lowshot"}) for s in (config.load(stored), spec))
    changed = [
        f"evaluate.{key} {then[key]}, now {now[key]}" for key in now if then[key] != now[key]
    ]
    if changed:
        raise UserError(
            f"--resume auto: {stored.parent} has {'; '.join(changed)}; give another --output"
        )


def choose(names: Sequence[str] | None) -> tuple[str, ...]:
    """The backends to train on.

    Args:
        names: backends; None: all installed backends.

    Raises:
        UserError: there is no backend, or one of them is unknown or not installed.
    """
    names = backends.installed() if names is None else tuple(names)
    if not names:
        raise UserError("no backend to train on; tools/info.py env says how to add one")
    for name in names:
        backends.check(name)
    return names


def train_all(
    path: str | Path,
    overrides: Sequence[str],
    names: Sequence[str],
    output: Path,
    *,
    resume: str | None = None,
) -> list[Path]:
    """Trains one backend after the other; returns the run directories in the order of ``names``.

    The standard output of a run goes to ``<output>/<name>.log``, its errors to the terminal.

    Raises:
        UserError: ``output`` cannot be made, or a run did not reach its end.
        SystemExit: a signal asked for a stop; the run has saved its state.
    """
    run_dirs = [output / name for name in names]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot write: {error.strerror}") from error
    for name, run_dir in zip(names, run_dirs, strict=True):
        pairs = ["-o", *overrides] if overrides else []
        pairs += ["--resume", resume] if resume else []
        command = ["train", "-c", str(path), *pairs, "--backend", name, "--output", str(run_dir)]
        log = output / f"{name}.log"
        # Printed before the run begins: if printing fails, nothing is left behind.
        print(f"{name}: training, see {printable(str(log))}", flush=True)
        with log.open("a" if run_dir.exists() else "w") as file:
            child = subprocess.Popen([*_TRIPTYCH, *command], stdin=subprocess.DEVNULL, stdout=file)
        status = _wait(child, log)
        if status > 128:
            raise SystemExit(status)
        if status:
            raise UserError(f"{name}: training ended with exit status {status}; see {log}")
    return run_dirs


def add_baselines(spec: RunSpec, run_dirs: Sequence[Path]) -> None:
    """Writes beside each run the evaluations that its features are compared with.

    One evaluates the same encoder with its initial weights on the same backend, the other the
    pixels themselves.

    Raises:
        UserError: the data have no labelled evaluation split, or a backend failed.
    """
    protocols, split, pixels = spec.evaluate.protocols, Split(spec), raw_pixels()
    with split.sharing():
        raw = [
            row.as_json()
            for name in protocols
            if PROTOCOLS[name].pixels
            for row in PROTOCOLS[name].rows(split, pixels)
        ]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "initial.npz"
        np.savez(weights, **initial_state(spec))
        for run_dir in run_dirs:
            rows = [
                row for name in protocols for row in _evaluate(name, run_dir / "spec.yaml", weights)
            ]
            text = "".join(json.dumps(row) + "\n" for row in [*rows, *raw])
            write_atomically(run_dir / BASELINES, text)


def print_table(records: Sequence[RunRecord]) -> None:
    """Prints the runs side by side."""
    rows = table.table(records)
    lines = [table.cells(row, rows) for row in rows]
    shown = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),  # three backends fit into 80 columns
        caption=table.caption(rows),
    )
    for heading, column in zip(table.headings(rows), zip(*lines, strict=True), strict=True):
        justify: Literal["left", "right"] = "right" if shown.columns else "left"
        # The heading may wrap between words, the numbers may not.
        width = max(map(len, (*heading.split(), *column)))
        shown.add_column(heading, justify=justify, width=width)
    for line in lines:
        shown.add_row(*map(Text, line))
    Console().print(shown)


_TRIPTYCH = (sys.executable, "-m", "triptych.core.cli")


def _wait(child: "subprocess.Popen[bytes]", log: Path) -> int:
    """Waits for a run and passes signals on, at which the run saves its state.

    From a terminal the run gets each signal twice; it takes both as one request
    (``signals.GRACE``).
    """
    previous = {
        number: signal.signal(number, lambda number, frame: child.send_signal(number))
        for number in heeded()
    }
    try:
        status = _follow(child, log)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    # Before its first step the signal itself ends the run.
    return 128 - status if -status in ENDINGS else status


def _follow(child: "subprocess.Popen[bytes]", log: Path) -> int:
    """Shows the run's latest line until the run ends, if there is a terminal."""
    with Console().status("") as status:
        while True:
            try:
                return child.wait(0.5)
            except subprocess.TimeoutExpired:
                last = log.read_text(errors="replace").rstrip().rpartition("\n")[2]
                status.update(Text(last))


def _evaluate(protocol: str, spec_file: Path, weights: Path) -> list[Row]:
    """Rows of the command ``eval`` on the backend that the spec names."""
    command = ["eval", protocol, "-c", str(spec_file), "--weights", str(weights), "--json"]
    done = subprocess.run(
        [*_TRIPTYCH, *command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    if done.returncode:
        raise UserError(f"{spec_file}: the evaluation of its initial weights failed (see above)")
    rows: list[Row] = json.loads(done.stdout)
    return rows
