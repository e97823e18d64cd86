"""The parts of the check of a GPU (``core.benchmarks.gpu``). Each returns rows with bars."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from types import ModuleType

import numpy as np

from triptych.core import config, launch, parameters
from triptych.core.benchmarks.cost import step_flops
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, Batch, Hyper, State, Tensor
from triptych.core.data.pixels import normalize
from triptych.core.engine import Engine
from triptych.core.evaluation.neighbours import neighbours
from triptych.core.evaluation.subject import on_host, product_of
from triptych.core.methods import METHODS
from triptych.core.parity.compare import compare, relative_error
from triptych.core.parity.trace import trace
from triptych.core.reference import ops as reference

DIGITS = ("moco_v3/digits", "moco_v1/digits", "moca/digits")
"""Recipes small enough for float64: a ViT, a ResNet with virtual ranks, a codebook."""
STEPS = 3
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: was measured.
        value: the figure.
        least: it must not be less.
        most: it must not be more.
        foreseen: what was computed before any card was seen.
    """

    what: str
    value: float
    least: float | None = None
    most: float | None = None
    foreseen: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the figure keeps its bars. A nan keeps none."""
        return (self.least is None or self.value >= self.least) and (
            self.most is None or self.value <= self.most
        )


@dataclass(frozen=True)
class Check:
    """What is checked.

    Attributes:
        device: "cpu" for a dry run, or a CUDA device.
        native: the backend's module ``gpu``.
        backend: its name.
        small: whether sizes are those of a dry run.
    """

    device: str
    native: ModuleType
    backend: str
    small: bool

    def spec(self, recipe: str, precision: str, *overrides: str) -> RunSpec:
        """A recipe on the device."""
        common = [f"device={self.device}", f"precision={precision}", "train.steps=1000"]
        return config.load(recipe, [*common, "train.epochs=null", *overrides])

    def sized(self, recipe: str, count: int) -> RunSpec:
        """A recipe in bfloat16 with a batch of ``count`` images; in a dry run, a small one."""
        recipe, count = (DIGITS[0], 8) if self.small else (recipe, count)
        return self.spec(recipe, "bfloat16", f"train.batch_size={count}")

    def engine(self, spec: RunSpec) -> Engine:
        """An engine with the spec's first state."""
        return launch.open_engine(spec, self.backend, parameters.initial_state(spec))


def machine(check: Check) -> Iterator[Row]:
    """The card's limits, which other parts are compared with."""
    found = check.native.ceilings(check.device, 64 if check.small else 8192)
    foreseen = {} if check.small else {"copy": 3000.0, "bfloat16": 790.0, "float32": 52.0}
    for name, value in found.items():
        unit = "GB/s" if name == "copy" else "TFLOP/s"
        yield Row(f"{name}, {unit}", value, foreseen=foreseen.get(name))


def exact(check: Check) -> Iterator[Row]:
    """Three steps in float64 beside the same steps on the CPU."""
    for recipe in DIGITS[: 1 if check.small else None]:
        yield _against_cpu(check, recipe, "float64", STEPS)


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
                lambda step: METHODS[spec.method.name].draws(spec, step),
                _hyper,
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
    draws = METHODS[spec.method.name].draws(spec, 0)
    return engine.loss_and_grads(numbers(spec, 0), draws, _hyper(0))


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
                engine.train_step(pixels(spec, step), _draws(spec, step), _hyper(step))
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


def silent(check: Check) -> Iterator[Row]:
    """Five steps in which the host waits for nothing, and what one of them launches.

    A CPU, on which the host is the device, shows the number of operations alone.
    """
    spec = check.sized("moco_v3/vit_base", 64)
    engine = check.engine(spec)
    step = stepping(engine)
    step(), step()
    fetched: list[Callable[[], object]] = []
    with check.native.without_waits(check.device):
        for _ in range(5):
            fetched.append(engine.fetch(step()))
            for read in fetched[-2:-1]:
                read()  # a step late, as in training
    found = check.native.activity(check.device, step)
    yield Row("kernels of a step", found["kernels"], foreseen=None if check.small else 2192)
    if check.device != "cpu":
        # A wait would have ended this part with an error.
        yield Row("steps without a wait of the host", len(fetched), least=5)
        yield Row("copies to the device of a step", found["copies"], least=1, most=1)
        yield Row("copies from memory that is not pinned", found["pageable"], most=0)


SPEED = {
    "moco_v3/vit_base": (512, 1250.0),
    "moco_v2/resnet50": (256, None),
    "moca/v1_0_vit_base": (256, 1500.0),
}
"""Recipe -> images of a batch on one card, and images/s that are foreseen without compilation."""


def speed(check: Check) -> Iterator[Row]:
    """Whole steps in bfloat16 from bytes on the host: time, rate, memory, share of the floor."""
    peak = check.native.ceilings(check.device, 64 if check.small else 8192)["bfloat16"]
    for recipe, (count, foreseen) in islice(SPEED.items(), 1 if check.small else None):
        spec = check.sized(recipe, count)
        check.native.peak_memory(check.device)
        step, images = stepping(check.engine(spec)), spec.train.batch_size
        step(), step()
        seconds = check.native.seconds_of(check.device, step, 2 if check.small else 20)
        work = 2 * step_flops(spec) * images
        recipe, rate = (DIGITS[0], None) if check.small else (recipe, foreseen)
        yield Row(f"{recipe} batch {images}, ms", 1000 * seconds)
        yield Row(f"{recipe}, images/s", images / seconds, foreseen=rate)
        yield Row(f"{recipe}, share of the floor", work / seconds / (peak * 1e12))
        yield Row(f"{recipe}, peak GiB", check.native.peak_memory(check.device))


def feeding(check: Check) -> Iterator[Row]:
    """Bytes through the courier beside normalised numbers by a plain copy."""
    spec = check.spec(DIGITS[0], "float32")
    engine, images = check.engine(spec), 8 if check.small else 512
    planes = np.zeros((2, images, 3, 224, 224), np.uint8)
    numbers = normalize(planes, MEAN, DEVIATION)

    def carry(array: Array) -> Tensor:
        return engine.courier.carry([array])[0] if engine.courier else engine.tensor(array)

    ways: dict[str, tuple[Array, Callable[[Array], Tensor]]] = {
        "bytes by the courier": (planes, carry),
        "numbers by a copy": (numbers, engine.tensor),
    }
    rates = {}
    for name, (array, send) in ways.items():
        seconds = []
        for _ in range(4):
            begun = time.perf_counter()
            engine.array(send(array)[0, 0, 0, 0])  # waits for the copy
            seconds.append(time.perf_counter() - begun)
        rates[name] = images / min(seconds)
        yield Row(f"{name}, images/s", rates[name])
        yield Row(f"{name}, bytes an image", array.nbytes / images, most=301_056 * array.itemsize)
    if check.device != "cpu":
        first, second = rates.values()
        yield Row("bytes over numbers", first / second, least=1.5)


def nearest(check: Check) -> Iterator[Row]:
    """Nearest neighbours by products of the device beside those of the host: the same ones."""
    engine = check.engine(check.spec(DIGITS[0], "float32"))
    rng, count = np.random.default_rng(0), 9000 if check.small else 100_000
    bank, queries = (rng.standard_normal((n, 384)).astype(np.float32) for n in (count, count // 50))
    found, seconds = [], []
    for product in (on_host, product_of(engine)):
        begun = time.perf_counter()
        found.append(neighbours(bank, queries, 20, product=product))
        seconds.append(time.perf_counter() - begun)
    differences = sum(int((a != b).sum()) for a, b in zip(*found, strict=True))
    yield Row("neighbours that differ from the host's", differences, most=0)
    yield Row("time of the host over the device's", seconds[0] / seconds[1])


PARTS: dict[str, Callable[[Check], Iterable[Row]]] = {
    "machine": machine,
    "exact": exact,
    "single": single,
    "rough": rough,
    "half": half,
    "codes": codes,
    "repeats": repeats,
    "pixel": pixel,
    "silent": silent,
    "feeding": feeding,
    "nearest": nearest,
    "speed": speed,
}
"""In the order of their run: what time is left is that of the last."""


def levels(channels: int) -> Array:
    """See ``Batch.levels``."""
    rows = (np.array(row, np.float32) for row in (255, MEAN[:channels], DEVIATION[:channels]))
    return np.stack([np.broadcast_to(r, channels) for r in rows]).reshape(3, channels, 1, 1)


def pixels(spec: RunSpec, seed: int) -> Batch:
    """A batch of random bytes, as a device gets it."""
    rng, count = np.random.default_rng(seed), spec.train.batch_size
    shape = (count, spec.model.channels, *spec.model.size)
    views = tuple(rng.integers(0, 256, shape, np.uint8) for _ in range(spec.method.views))
    return Batch(views, np.arange(count), levels=levels(spec.model.channels))


def numbers(spec: RunSpec, seed: int) -> Batch:
    """The same batch, normalised on the host."""
    batch, channels = pixels(spec, seed), spec.model.channels
    views = (normalize(v, MEAN[:channels], DEVIATION[:channels]) for v in batch.views)
    return replace(batch, views=tuple(views), levels=None)


def stepping(engine: Engine) -> Callable[[], dict[str, object]]:
    """A function that queues one step after the other, from two batches in turn."""
    batches, done = [pixels(engine.spec, seed) for seed in range(2)], [0]

    def step() -> dict[str, object]:
        number = done[0]
        done[0] += 1
        batch, draws = batches[number % 2], _draws(engine.spec, number)
        return dict(engine.train_step(batch, draws, _hyper(number)))

    return step


def _draws(spec: RunSpec, step: int) -> Mapping[str, Array]:
    return METHODS[spec.method.name].draws(spec, step)


def _hyper(step: int) -> Hyper:
    return Hyper(step=step, lr=1e-4, weight_decay=0.1, ema=0.99)
