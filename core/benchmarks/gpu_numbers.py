"""The parts of the check of a GPU that look at numbers: precision, determinism, pixels."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from triptych.core import parameters
from triptych.core.benchmarks.gpu_check import (
    DEVIATION,
    DIGITS,
    MEAN,
    Check,
    Row,
    draws,
    hyper,
    levels,
    numbers,
    pixels,
)
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, State
from triptych.core.data.pixels import normalize
from triptych.core.parity.compare import compare, relative_error
from triptych.core.parity.trace import trace

STEPS = 3
CURVE = 100
"""Steps of a curve; a dry run has fewer."""


def exact(check: Check) -> Iterator[Row]:
    """Three steps in float64 beside the same steps on the CPU."""
    for recipe in DIGITS[: 1 if check.small else None]:
        yield _against_cpu(check, recipe, "float64", STEPS)


def curve(check: Check) -> Iterator[Row]:
    """The losses of a hundred steps in float64 beside those on the CPU."""
    for recipe in DIGITS[: 1 if check.small else None]:
        spec = check.spec(recipe, "float64", "train.batch_size=16")
        count = STEPS if check.small else CURVE
        here, there = (
            losses(check, each, count) for each in (spec, spec.model_copy(update={"device": "cpu"}))
        )
        worst = max(relative_error(a, b) for a, b in zip(here, there, strict=True))
        yield Row(f"{recipe} float64, losses of {count} steps against cpu", worst, most=1e-10)


def losses(check: Check, spec: RunSpec, count: int) -> list[Array]:
    """The losses of the first steps."""
    engine, found = check.engine(spec), []
    for step in range(count):
        metrics = engine.train_step(pixels(spec, step), draws(spec, step), hyper(step))
        found.append(engine.array(metrics["loss"]))
    return found


def single(check: Check) -> Iterator[Row]:
    """One step in float32 beside the same step on the CPU."""
    yield _against_cpu(check, DIGITS[0], "float32", 1)


def rough(check: Check) -> Iterator[Row]:
    """The same with TF32, which must not pass for float32. A CPU has none."""
    if check.device != "cpu":
        row = _against_cpu(check, DIGITS[0], "tf32", 1)
        yield replace(row, least=row.most, most=None)


def _against_cpu(check: Check, recipe: str, precision: str, steps: int) -> Row:
    """The worst error over all arrays of a trace, in units of what is allowed."""
    spec = check.spec(recipe, precision, "train.batch_size=16")
    other = "float32" if precision == "tf32" else precision
    beside = spec.model_copy(update={"device": "cpu", "precision": other})
    records = [
        dict(
            trace(
                each,
                check.backend,
                parameters.initial_state(spec),
                (numbers(each, step) for step in range(steps)),
                lambda step: draws(spec, step),
                hyper,
                steps,
            )
        )
        for each in (spec, beside)
    ]
    differences, _ = compare(records[0], records[1])
    worst = max(difference.severity for difference in differences)
    return Row(f"{recipe} {precision} against cpu, of the allowed error", worst, most=1.0)


def half(check: Check) -> Iterator[Row]:
    """Loss and gradient in 16 bits beside float64."""
    for recipe, most in zip((DIGITS[0], DIGITS[2]), (0.6, 0.1), strict=True):
        want, want_grads = _differentiated(check, recipe, "float64")
        for precision in ("bfloat16", "float16"):
            got, got_grads = _differentiated(check, recipe, precision)
            error = relative_error(got["loss"], want["loss"])
            off = _off(got_grads, want_grads)
            yield Row(f"{recipe} {precision}, error of the loss", error, most=0.05)
            yield Row(f"{recipe} {precision}, error of the gradient", off, most=most)
        if check.small:
            return


def codes(check: Check) -> Iterator[Row]:
    """MOCA's codes beside networks in bfloat16: they keep float32's digits."""
    from triptych.core.reference import ops as reference

    n, length, width, words = (2, 16, 48, 64) if check.small else (256, 196, 768, 4096)
    rng = np.random.default_rng(0)
    shared, sharpness = rng.standard_normal(width), np.full(1, 30.0, np.float32)
    x = (rng.standard_normal((n, length, width)) + shared).astype(np.float32)
    rows = (rng.standard_normal((words, width)) + shared).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    want, _ = reference.soft_assign(*(a.astype(np.float64) for a in (x[:2], rows, sharpness)))
    seconds = []
    for precision in ("bfloat16", "float32"):
        engine = check.engine(check.spec(DIGITS[2], precision))
        call = partial(engine.ops.soft_assign, *map(engine.tensor, (x, rows, sharpness)))
        error = np.abs(engine.array(call()[0][:2]) - want).max()
        yield Row(f"codes beside {precision}, error", float(error), most=1e-4)
        seconds.append(check.native.seconds_of(check.device, call, 5))
    yield Row("time of codes beside float32 over bfloat16", seconds[1] / seconds[0])


def _differentiated(check: Check, recipe: str, precision: str) -> tuple[Mapping[str, Array], State]:
    """Metrics and gradients of a first step."""
    spec = check.spec(recipe, precision, "train.batch_size=16")
    engine = check.engine(spec)
    if engine.loss_scale:
        engine.loss_scale.scale = 256  # the first one may be too large for a first step
    return engine.loss_and_grads(numbers(spec, 0), draws(spec, 0), hyper(0))


def _off(got: Mapping[str, Array], want: Mapping[str, Array]) -> float:
    """Relative error of a whole gradient, in the Euclidean norm."""
    off = sum(float(np.sum((got[n].astype(np.float64) - x) ** 2)) for n, x in want.items())
    return float(
        np.sqrt(off / sum(float(np.sum(x.astype(np.float64) ** 2)) for x in want.values()))
    )


def repeats(check: Check) -> Iterator[Row]:
    """Two equal runs, and one that is resumed, give equal bytes."""
    for recipe, precision in (
        (DIGITS[0], "bfloat16"),
        (DIGITS[0], "float16"),
        (DIGITS[0], "float32"),
        (DIGITS[1], "float32"),
    ):
        spec = check.spec(recipe, precision, "train.batch_size=16")
        states = []
        for pause in (None, None, 2):
            engine = check.engine(spec)
            for step in range(4):
                if step == pause:
                    saved, engine = engine.export_state(), check.engine(spec)
                    engine.import_state(saved)
                engine.train_step(pixels(spec, step), draws(spec, step), hyper(step))
            states.append(engine.export_state())
        for what, other in zip(("repeated", "resumed"), states[1:], strict=True):
            differ = sum(not np.array_equal(x, states[0][n]) for n, x in other.items())
            yield Row(f"{recipe} {precision}, tensors that differ when {what}", differ, most=0)
        if check.small:
            return


def pixel(check: Check) -> Iterator[Row]:
    """Bytes that the device normalises have the values of the host."""
    spec = check.spec(DIGITS[0], "float32")
    engine, every = check.engine(spec), np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    planes = np.tile(every, (2, 3, 1, 1))
    found = engine.ops.normalized(engine.tensor(planes), engine.tensor(levels(3)))
    differ = np.sum(engine.array(found) != normalize(planes, MEAN, DEVIATION))
    yield Row("normalised pixels that differ from the host's", float(differ), most=0)
