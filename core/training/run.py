"""Trains a spec to a finished run.

Everything is checked and built before the first file is written. A run directory holds spec.yaml,
metrics.jsonl, TensorBoard events, checkpoints/ and, once the run has reached its last step,
result.json.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from triptych.core import checkpoint
from triptych.core.config import CONFIGS, dump, find
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE, Ranks, State
from triptych.core.data import Pipeline, Source, Splits, few_levels, open_splits, split_digest
from triptych.core.data.views import engine_versions
from triptych.core.engine import Engine
from triptych.core.errors import UserError, printable
from triptych.core.evaluation import PROTOCOLS, classifier
from triptych.core.evaluation.row import Evaluation
from triptych.core.evaluation.sharing import share_statistics
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.subject import Check, encoder
from triptych.core.files.checksum import state_digest
from triptych.core.files.writing import occupied, write_atomically
from triptych.core.launch import load, open_engine, quiet
from triptych.core.machine.resources import cpu_threads
from triptych.core.optim.plan import Plan
from triptych.core.parallel.agreement import (
    check_same,
    program_digest,
    sections,
    together,
    whole,
)
from triptych.core.runs.log import Logs, NoLogs, read_rows
from triptych.core.training import cached, frozen
from triptych.core.training.resume import Start, find_start
from triptych.core.training.terminal import Terminal
from triptych.core.training.trainer import Trainer

Say = Callable[[str], None]


def default_output(config: str | Path, backend: str) -> Path:
    """``runs/<recipe>-<backend>``. For a shipped recipe, its folder's name comes first."""
    path = find(config).resolve().with_suffix("")
    inside = path.is_relative_to(CONFIGS)
    name = "-".join(path.relative_to(CONFIGS).parts) if inside else path.name
    return Path("runs") / f"{name}-{backend}"


def train(
    spec: RunSpec,
    backend: str,
    run_dir: Path,
    *,
    resume: str | None = None,
    say: Say = print,
    ranks: Ranks = ALONE,
) -> int | None:
    """Trains one run, from the checks to ``result.json``.

    Args:
        backend: as ``choose_backend`` gives it; replaces the spec's backend.
        resume: "auto", the path of a checkpoint or a run, or None for a fresh run.
        ranks: the processes that train together; the main one writes files and lines.

    Returns:
        None after the last step, else the signal that ended the run. The state is saved.

    Raises:
        UserError: the run cannot work (no file is written), or later a write or read fails.
        NonFiniteError: training went non-finite.
    """
    say = say if ranks.is_main else quiet
    spec = spec.model_copy(update={"backend": backend})
    with ExitStack() as stack:
        splits, stamp = _opened(spec, backend, say, ranks)
        with together(ranks):
            pipeline = stack.enter_context(Pipeline(spec, splits.train, ranks.replicas))
            plan = Plan(spec, pipeline.steps_per_epoch)
            split = _open_split(spec, splits)
            begin, state = find_start(spec, run_dir, resume, stamp, say, plan.steps_per_epoch)
            origin = str(begin.path or resume)
            engine = open_engine(
                spec, backend, state, whole=begin.whole, origin=origin, ranks=ranks
            )
            stack.enter_context(closing(engine))
            pipeline.as_bytes = engine.courier is not None
        _check_start(begin, state, plan, ranks)
        del state  # the engine has a copy
        with together(ranks):
            logs = NoLogs() if not ranks.is_main else _enter(stack, engine, run_dir, begin, say)
            _announce(stamp, engine, plan, splits.train, run_dir, say)
        with whole(ranks):
            feed = cached.feed(engine, pipeline, splits.train, say)
        terminal = Terminal(plan.last_step, begin.step, shown=ranks.is_main)
        stack.enter_context(closing(terminal))
        evaluate = partial(_evaluate, engine, split, terminal)
        trainer = Trainer(
            *(spec, engine, feed, plan, run_dir, logs, terminal, evaluate, stamp),
            *(begin.step, begin.path, begin.seconds, begin.evaluating, begin.foreign, ranks),
        )
        with frozen.unchanged(engine) as encoder_digest:
            signal = trainer.fit()
        with together(ranks):
            if ranks.is_main and signal is None:
                _write_result(run_dir, trainer, encoder_digest)
            say(_last_line(trainer, signal))
    return signal


def _opened(spec: RunSpec, backend: str, say: Say, ranks: Ranks) -> tuple[Splits, dict[str, Any]]:
    """The data and the stamp of a run, which all processes have alike."""
    with together(ranks):
        splits = _open_data(spec, say)
        stamp = _stamp(spec, backend, splits)
    if ranks.world > 1:
        check_same(ranks, _common(spec, stamp))
    return splits, stamp


def _open_data(spec: RunSpec, say: Say) -> Splits:
    splits = open_splits(spec, held_out=spec.evaluate.every > 0, say=say)
    for note in splits.notes():
        say(note)
    return splits


def _open_split(spec: RunSpec, splits: Splits) -> Split | None:
    """The split that the run evaluates, or None if it does not."""
    if not spec.evaluate.every:
        return None
    split = Split(spec, splits)
    if spec.method.labelled:
        classifier.check(split)
        return split
    for name in spec.evaluate.protocols:
        PROTOCOLS[name].check(split)
    return split


def _stamp(spec: RunSpec, backend: str, splits: Splits) -> dict[str, Any]:
    """What may change numbers; checkpoints store it beside the state."""
    module = load(spec, backend)
    return {
        "backend": backend,
        "versions": {**module.versions(), **engine_versions(spec.augment.engine)},
        "compute": module.compute(spec),
        "threads": cpu_threads(spec),
        "data": split_digest(splits.train),
    }


def _common(spec: RunSpec, stamp: Mapping[str, Any]) -> dict[str, str]:
    """What all processes of a run must have alike, by name."""
    return {
        "version of the program": program_digest(),
        "version of the framework": json.dumps(stamp["versions"]),
        **sections(spec),
        "images of the data set": stamp["data"],
    }


def _check_start(begin: Start, state: State, plan: Plan, ranks: Ranks) -> None:
    """Raises UserError if there is no step to do, or the ranks do not begin alike."""
    with together(ranks):
        # A run of ours that is complete is left as it is. This one would save nothing.
        if begin.foreign and begin.step >= plan.last_step:
            raise UserError(
                f"--resume: the file holds {begin.step} updates, and the run ends after "
                f"{plan.last_step}; raise train.steps or train.epochs"
            )
    if ranks.world == 1:
        return
    newest = ranks.largest(begin.step)
    with together(ranks):
        if begin.step != newest:
            raise UserError(
                f"--resume: process {ranks.rank} of {ranks.world} finds step {begin.step}, another "
                f"one step {newest}; give a folder that all machines of the run share"
            )
    check_same(ranks, {"weights that they begin with": state_digest(state)})


def _evaluate(
    engine: Engine, split: Split | None, terminal: Terminal, step: int, check: Check
) -> Sequence[Evaluation]:
    if split is None:
        return []
    share_statistics(engine)
    rows = _rows(engine, split, step, check)
    for name in split.damaged():
        terminal.line(f"damaged, left out of the evaluation: {printable(name)}")
    for name, text in split.warnings():
        terminal.warning(name, text)
    return rows


def _rows(engine: Engine, split: Split, step: int, check: Check) -> Sequence[Evaluation]:
    """The evaluation of the classifier, if the method has one, else of the features."""
    if engine.spec.method.labelled:
        return classifier.rows(split, engine, step, check)
    settings = split.spec.evaluate
    protocols = [PROTOCOLS[name] for name in settings.protocols]
    choices = {protocol.choice(settings) for protocol in protocols}
    subjects = {c: encoder(engine, step, c, check) for c in choices}
    with split.sharing():
        return [
            row
            for protocol in protocols
            for row in protocol.rows(split, subjects[protocol.choice(settings)])
        ]


def _try_out(spec: RunSpec, engine: Engine, run_dir: Path, say: Say) -> None:
    """Raises UserError if the folder cannot take a checkpoint of this engine."""
    shapes = {name: slot.shape for name, slot in engine.slots().items()}
    files = checkpoint.sizes(shapes, 8 if spec.precision == "float64" else 4)
    checkpoint.try_out(run_dir, files, spec.checkpoint.keep, say)


def _enter(stack: ExitStack, engine: Engine, run_dir: Path, begin: Start, say: Say) -> Logs:
    """Locks the run's folder until the stack ends, and opens the logs in it."""
    stack.enter_context(occupied(run_dir, say))
    _try_out(engine.spec, engine, run_dir, say)
    return stack.enter_context(closing(_open_logs(engine.spec, run_dir, begin, say)))


def _open_logs(spec: RunSpec, run_dir: Path, begin: Start, say: Say) -> Logs:
    (run_dir / "result.json").unlink(missing_ok=True)  # it is the result of an earlier run
    write_atomically(run_dir / "spec.yaml", dump(spec))
    say(f"resolved spec: {run_dir / 'spec.yaml'}")
    events = spec.log.tensorboard
    return Logs(run_dir, begin.step, before=begin.before, tensorboard=events, say=say)


def _headline(
    stamp: Mapping[str, Any], engine: Engine, plan: Plan, images: int, run_dir: Path
) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in stamp["versions"].items())
    batch = plan.spec.train.batch_size
    return (
        f"{stamp['backend']} ({versions}) on {engine.context.device}, {engine.context.precision}, "
        f"{stamp['threads']} threads: {plan.total_steps} steps of {batch} images, "
        f"{plan.steps_per_epoch} for each pass over {images}; writing to {run_dir}"
    )


def _announce(
    stamp: Mapping[str, Any], engine: Engine, plan: Plan, source: Source, run_dir: Path, say: Say
) -> None:
    """Says what runs where, and warns if 16-bit images lose most of their levels."""
    say(_headline(stamp, engine, plan, len(source), run_dir))
    if warning := few_levels(source):
        say(f"warning: {warning}")


def _last_line(trainer: Trainer, signal: int | None) -> str:
    done = "done" if signal is None else "stopped, to go on with --resume auto"
    return f"{trainer.run_dir}: {done} after step {trainer.step} of {trainer.plan.total_steps}"


def _write_result(run_dir: Path, trainer: Trainer, frozen_encoder: str | None) -> None:
    rows = read_rows(run_dir / "metrics.jsonl")
    steps = [row for row in rows if "eval" not in row]
    spec, seconds = trainer.spec, trainer.meter.seconds
    images = (trainer.step - trainer.foreign) * spec.train.batch_size
    result = {
        **trainer.stamp,
        "device": trainer.engine.context.device,
        "precision": spec.precision,
        "seed": spec.seed,
        "spec_hash": spec_hash(spec),
        "steps": trainer.step,
        "first_loss": steps[0]["loss"] if steps else None,
        "last_loss": steps[-1]["loss"] if steps else None,
        "chance": steps[-1]["chance"] if steps else trainer.health.chance,
        "state": trainer.health.state,
        "evaluations": [row for row in rows if "eval" in row],
        "seconds": seconds,
        "evaluate_seconds": trainer.meter.evaluating,
        "evaluate_share": trainer.meter.whole_evaluation_share(),
        "images_per_second": images / seconds,
    }
    if frozen_encoder:
        result["frozen_encoder"] = frozen_encoder
    write_atomically(run_dir / "result.json", json.dumps(result, indent=1) + "\n")


def spec_hash(spec: RunSpec) -> str:
    """Sixteen hexadecimal digits, equal for specs that differ only in the backend."""
    content: dict[str, Any] = spec.model_dump(mode="json", exclude={"backend"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
