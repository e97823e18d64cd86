"""Records the state, gradients, features and metrics of a few training steps on one backend."""

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from triptych.core import formats, methods, parameters
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, Batch, Hyper, State
from triptych.core.data import Pipeline, open_train
from triptych.core.engine import Engine
from triptych.core.errors import UserError
from triptych.core.launch import open_engine
from triptych.core.optim.plan import Plan
from triptych.core.parity.compare import NOT_COMPARED, SPEC
from triptych.core.parity.inputs import recorded, takes_features

Record = Iterator[tuple[str, Array]]

_write_array: Callable[..., None] = np.lib.format.write_array


def trace(
    spec: RunSpec,
    backend: str,
    state: State,
    batches: Iterator[Batch],
    draws: Callable[[int], Mapping[str, Array]],
    hyper: Callable[[int], Hyper],
    steps: int,
) -> Record:
    """Trains ``steps`` steps and yields named arrays in the order of their computation.

    Yields:
        ``feature/backbone``, ``feature/tokens_ln``, ``feature/proj``: of view 1 of step 0, in
            evaluation mode with the initial weights.
        ``state/<canonical>/step<k>``: for k = 0 (before the first step) to ``steps``.
        ``feature/<name>/step<k>``: for each step k.
        ``grad/<canonical>/step<k>``: for each step k.
        ``loss``: (steps,), at the end.
        ``metric/<name>``: (steps,), at the end.
    """
    whole = any(name.startswith("optimizer.") for name in state)
    engine = open_engine(spec, backend, state, whole=whole)
    scalars: dict[str, list[Array]] = {}
    for step, batch in zip(range(steps), batches, strict=False):
        if step == 0:
            if batch.views[0].ndim == 4:  # not cached features
                yield from _evaluation_features(engine, batch.views[0])
            yield from _labelled("state", engine.export_state(), 0)
        values, gradients = engine.trace_step(batch, draws(step), hyper(step))
        for name, value in values.items():
            if name.startswith("feature/"):
                yield f"{name}/step{step}", value
            else:
                key = name if name == "loss" else f"metric/{name}"
                scalars.setdefault(key, []).append(value)
        yield from _labelled("grad", gradients, step)
        yield from _labelled("state", engine.export_state(), step + 1)
    engine.close()
    yield from ((name, np.array(values)) for name, values in scalars.items())


def _evaluation_features(engine: Engine, view: Array) -> Record:
    projection = bool(parameters.parts(engine.spec).projector.layers)
    features = engine.embed(view, tokens="all", projection=projection)
    yield "feature/backbone", features["final"][:, 0]
    yield "feature/tokens_ln", features["final"]
    if projection:
        yield "feature/proj", features["projection"]


def _labelled(kind: str, arrays: Mapping[str, Array], step: int) -> Record:
    yield from ((f"{kind}/{name}/step{step}", array) for name, array in arrays.items())


def starting_state(
    spec: RunSpec, weights: Path | None, say: Callable[[str], None] = lambda line: None
) -> State:
    """The state of a weights file in any known format, or the spec's first state.

    Args:
        spec: of the run.
        weights: path of the file. The state has the entries of its optimizer, if it has one.
        say: called with a line for each entry of the optimizer that starts anew or is left out.
    """
    if weights is None:
        return formats.initial_state(spec)
    return formats.load_training_state(weights, spec, say)


def fixed_hyper(path: Path) -> Callable[[int], Hyper]:
    """Constant learning rate, weight decay and EMA momentum from a JSON file.

    Raises:
        UserError: the file is unreadable, or a number is missing or out of bounds.
    """
    try:
        values = json.loads(path.read_text())
        lr, decay, ema = (float(values[key]) for key in ("lr", "weight_decay", "ema"))
        if not (0 <= lr < math.inf and 0 <= decay < math.inf and 0 <= ema <= 1):
            raise ValueError(f"lr {lr:g}, weight_decay {decay:g}, ema {ema:g}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f'{path}: expected {{"lr": ..., "weight_decay": ..., "ema": ...}}, finite numbers '
            f"from 0, ema up to 1; got {error!r}"
        ) from error
    return lambda step: Hyper(step=step, lr=lr, weight_decay=decay, ema=ema)


def run_trace(
    spec: RunSpec,
    backend: str,
    steps: int,
    *,
    weights: Path | None = None,
    inputs: Path | None = None,
    hyper: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Record:
    """``trace`` with weights, images, draws and hyper-parameters from files or from the spec.

    The record begins with the spec itself, as the bytes of a JSON object. ``say`` is as in
    ``starting_state``.

    Raises:
        UserError: a file is unusable, or the schedules need data and there is none.
    """
    yield SPEC, np.frombuffer(spec.model_dump_json(exclude=NOT_COMPARED).encode(), np.uint8)
    state = starting_state(spec, weights, say)
    method = methods.METHODS[spec.method.name]
    if inputs is None and takes_features(spec):
        raise UserError(
            "method.features: cached: a trace needs the features; give --inputs, or "
            "-o method.features=augmented"
        )
    if inputs is None:
        with Pipeline(spec, open_train(spec)) as pipeline:
            plan = Plan(spec, pipeline.steps_per_epoch)
            step_hyper = fixed_hyper(hyper) if hyper else plan.hyper
            batches = pipeline.batches(0, steps)
            yield from trace(
                spec, backend, state, batches, lambda k: method.draws(spec, k), step_hyper, steps
            )
        return
    if hyper is None and spec.train.steps is None:
        raise UserError(
            "train.epochs: schedules in epochs need the data; give --hyper or train.steps"
        )
    batches, draws = recorded(inputs, spec, steps)
    step_hyper = fixed_hyper(hyper) if hyper else Plan(spec, 1).hyper
    yield from trace(spec, backend, state, batches, draws, step_hyper, steps)


def save(record: Record, path: Path) -> None:
    """Writes a record as npz, one array at a time, since a trace may be larger than memory."""
    aside = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(aside, "w") as archive:
            for name, array in record:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    _write_array(file, np.asanyarray(array), allow_pickle=False)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
