"""Proof that two realisations compute the same: record a run's numbers, compare two records."""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triptych import backends
from triptych.core import algorithms, checkpoint, parameters, reference
from triptych.core.config.spec import RunSpec
from triptych.core.data import Pipeline, open_train
from triptych.core.engine import Array, Batch, Engine, Hyper, State
from triptych.core.errors import UserError
from triptych.core.plan import Plan

Record = Iterator[tuple[str, Array]]

# ---------------------------------------------------------------------------------------- trace


def trace(
    spec: RunSpec,
    backend: str,
    state: State,
    batches: Iterator[Batch],
    draws: Callable[[int], Mapping[str, Array]],
    hyper: Callable[[int], Hyper],
    steps: int,
) -> Record:
    """Trains ``steps`` steps and yields every number on the way, in the order they arise.

    Yields:
        ``feature/backbone|tokens|projection`` (view 1 of step 0, evaluation mode, initial
        weights); ``state/<canonical>/step<k>`` for k = 0 (before the first step) ... steps; for
        each step k ``feature/<name>/step<k>`` and ``grad/<canonical>/step<k>``; at the end
        ``loss`` (steps,) and ``metric/<name>`` (steps,).
    """
    engine = _build(spec, backend, state)
    scalars: dict[str, list[Array]] = {}
    for step, batch in zip(range(steps), batches, strict=False):
        if step == 0:
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


def _build(spec: RunSpec, backend: str, state: State) -> Engine:
    package = reference if backend == "numpy" else backends.load(backend)
    model = {p.name: state[p.name] for p in parameters.table(spec)}
    engine: Engine = package.build(spec, model)
    if set(state) != set(model):
        engine.import_state(state)
    return engine


def _evaluation_features(engine: Engine, view: Array) -> Record:
    features = engine.embed(view, tokens="all", projection=True)
    yield "feature/backbone", features["final"][:, 0]
    yield "feature/tokens", features["final"]
    yield "feature/projection", features["projection"]


def _labelled(kind: str, arrays: Mapping[str, Array], step: int) -> Record:
    yield from ((f"{kind}/{name}/step{step}", array) for name, array in arrays.items())


# ------------------------------------------------------------------------ where a trace starts


def starting_state(spec: RunSpec, weights: Path | None) -> State:
    """The state of a weights file in any format that converts, or the spec's initial one."""
    return checkpoint.load_weights(weights, spec) if weights else parameters.initial_state(spec)


def recorded_inputs(path: Path, steps: int) -> tuple[Iterator[Batch], dict[str, Array]]:
    """Batches and draws from a file: ``view1``, ``view2`` (steps, N, C, H, W) and draws by name.

    Raises:
        UserError: no such file, not an npz of plain arrays, or fewer steps than asked for.
    """
    arrays = checkpoint.read_arrays(path)
    missing = [name for name in ("view1", "view2") if name not in arrays]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing; found {', '.join(arrays)}")
    for name, array in arrays.items():
        if len(array) < steps:
            raise UserError(f"{path}: {name} holds {len(array)} steps, --steps is {steps}")
    views = [arrays.pop("view1"), arrays.pop("view2")]
    index = np.arange(views[0].shape[1], dtype=np.int64)
    batches = (Batch((one, two), index) for one, two in zip(*views, strict=True))
    return batches, arrays


def fixed_hyper(path: Path) -> Callable[[int], Hyper]:
    """The same learning rate, weight decay and EMA momentum for every step, from a JSON file."""
    try:
        given = json.loads(path.read_text())
        lr, decay, ema = (float(given[key]) for key in ("lr", "weight_decay", "ema"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path}: expected {{"lr": ..., "weight_decay": ..., "ema": ...}}, got {error!r}'
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
) -> Record:
    """``trace`` with weights, images, draws and hyper-parameters from files or from the spec.

    Raises:
        UserError: a file that cannot be used, or schedules that need data that is not there.
    """
    state = starting_state(spec, weights)
    method = algorithms.METHODS[spec.method.name]
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
    batches, given = recorded_inputs(inputs, steps)
    drawn = lambda k: {**method.draws(spec, k), **{n: a[k] for n, a in given.items()}}  # noqa: E731
    step_hyper = fixed_hyper(hyper) if hyper else Plan(spec, 1).hyper
    yield from trace(spec, backend, state, batches, drawn, step_hyper, steps)


def save(record: Record, path: Path) -> None:
    """Writes a record as npz, one array at a time: a trace may be larger than memory."""
    aside = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(aside, "w") as archive:
            for name, array in record:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------- compare

TOLERANCES = {
    "float64": {"loss": 1e-10, "metric": 1e-10, "feature": 1e-10, "grad": 1e-8, "state": 1e-8},
    "float32": {"loss": 1e-5, "metric": 1e-5, "feature": 1e-4, "grad": 1e-3, "state": 1e-3},
}
"""Largest relative error by kind of number; float32 after one step, see tests/golden/README.md."""

NOISE = {"float64": 1e-9, "float32": 1e-5}
"""A gradient below this share of the whole gradient's norm is rounding noise: its true value is 0."""


@dataclass(frozen=True)
class Difference:
    """One compared array: its relative error, max|a - b| / max|b|, and what was allowed."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the two agree; a nan never does."""
        return self.error <= self.allowed


def relative_error(a: Array, b: Array) -> float:
    """max|a - b| / max|b|; 0 for two zeros, inf for different shapes or a nan on one side only."""
    if a.shape != b.shape:
        return float("inf")
    if a.size == 0 or np.array_equal(a, b):
        return 0.0
    gap = float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))
    return gap / max(float(np.max(np.abs(b))), 1e-300) if np.isfinite(gap) else float("inf")


def noise_names(record: Mapping[str, Array], dtype: str) -> set[str]:
    """Canonical names whose gradient is rounding noise at some step.

    AdamW divides such noise by its own size, so these tensors, their teacher twins and their
    moments wander freely and say nothing about correctness.
    """
    norms: dict[str, dict[str, float]] = {}
    for key in record:
        if key.startswith("grad/"):
            _, name, step = key.split("/")
            norms.setdefault(step, {})[name] = float(np.linalg.norm(record[key].astype(np.float64)))
    noise: set[str] = set()
    for of_step in norms.values():
        total = float(np.linalg.norm(list(of_step.values())))
        noise |= {name for name, norm in of_step.items() if norm <= NOISE[dtype] * total}
    return noise


def compare(
    a: Mapping[str, Array], b: Mapping[str, Array], tolerances: Mapping[str, float] | None = None
) -> tuple[list[Difference], list[str]]:
    """Compares two records array by array.

    Args:
        tolerances: by kind (the first part of a name); default by the precision of ``a``'s loss.

    Returns:
        Differences, worst first in units of what is allowed, and the names left out as noise.

    Raises:
        UserError: the records do not hold the same arrays.
    """
    if set(a) != set(b):
        only = sorted(set(a) ^ set(b))
        raise UserError(f"the records hold different arrays: {', '.join(only[:5])} ({len(only)})")
    dtype = "float64" if b["loss"].dtype == a["loss"].dtype == np.float64 else "float32"
    allowed = {**TOLERANCES[dtype], **(tolerances or {})}
    noise = noise_names(b, dtype)
    found, left_out = [], []
    for name in a:
        if _is_noise(name, b, noise):
            left_out.append(name)
        else:
            error = relative_error(_certain(name, a[name]), _certain(name, b[name]))
            found.append(Difference(name, error, allowed[name.partition("/")[0]]))
    return sorted(found, key=lambda d: d.error / d.allowed, reverse=True), left_out


def _is_noise(name: str, record: Mapping[str, Array], noise: set[str]) -> bool:
    kind, _, rest = name.partition("/")
    if kind not in ("grad", "state"):
        return False
    tensor = rest.partition("/")[0]
    for prefix in ("optimizer.exp_avg.", "optimizer.exp_avg_sq."):
        tensor = tensor.removeprefix(prefix)
    if tensor.replace("teacher.", "student.", 1) in noise:
        return True
    if not tensor.endswith("running_mean"):
        return False
    # The mean of a batch norm behind a norm without shift is 0 but for rounding.
    spread = np.sqrt(np.max(record[name.replace("running_mean", "running_var")]))
    return bool(np.max(np.abs(record[name])) < 1e-9 * spread)


def _certain(name: str, array: Array) -> Array:
    """The part of an array that has a defined value: a key's bias never reaches the loss."""
    if ".attn.qkv.bias/" not in name:
        return array
    third = len(array) // 3
    return np.concatenate([array[:third], array[2 * third :]])
