"""The parts of the check of a GPU that look at time: waits, copies, loaders, steps."""

import gc
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from triptych.core.benchmarks import loader
from triptych.core.benchmarks.conditions import counted
from triptych.core.benchmarks.cost import step_flops
from triptych.core.benchmarks.gpu_check import (
    DEVIATION,
    DIGITS,
    MEAN,
    Check,
    Row,
    hyper,
    numbers,
    stepping,
)
from triptych.core.benchmarks.step import plain_module
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, Batch, Tensor
from triptych.core.data import Pipeline, open_train
from triptych.core.data.pixels import normalize
from triptych.core.evaluation.neighbours import neighbours
from triptych.core.evaluation.subject import on_host, product_of
from triptych.core.machine.environment import cores
from triptych.core.methods.colours import changed


@dataclass(frozen=True)
class Size:
    """Batches of a recipe that fit on one card of 80 GB.

    Attributes:
        images: of a batch.
        plain: of a batch of the plain loop, which keeps more.
        foreseen: images/s that were computed without compilation, before any card was seen.
        overrides: of the recipe, which make the plain loop's computation that of the recipe.
    """

    images: int
    plain: int
    foreseen: float | None = None
    overrides: tuple[str, ...] = ()


def machine(check: Check) -> Iterator[Row]:
    """The card's limits, which other parts are compared with."""
    found = check.native.ceilings(check.device, 64 if check.small else 8192)
    foreseen = {} if check.small else {"copy": 3000.0, "bfloat16": 790.0, "float32": 52.0}
    for name, value in found.items():
        unit = "GB/s" if name == "copy" else "TFLOP/s"
        yield Row(f"{name}, {unit}", value, foreseen=foreseen.get(name))


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


LOADED = "moco_v3/vit_small"
"""The recipe whose views are loaded."""
WORKERS = 14


def loading(check: Check) -> Iterator[Row]:
    """Views of JPEG files by workers alone, and by workers and the device: the same bytes."""
    workers, images = (1, 4) if check.small else (min(WORKERS, cores()), 64)
    with TemporaryDirectory(prefix="triptych-gpu-") as folder:
        loader.compile_loops()
        loader.write_photographs(Path(folder, "photographs"))
        specs = [
            loader.spec_of(LOADED, folder, workers, images, f"augment.on_device={on_device}")
            for on_device in ("false", "true")
        ]
        for spec, what in zip(specs, ("all", "decoding and crops"), strict=True):
            rate = loader.speed(loader.ours, spec, 2 if check.small else 32)
            yield Row(f"{what} by {counted(workers, 'worker')}, images/s", rate)
        host, device = map(_first_batch, specs)
    engine = check.engine(check.spec(DIGITS[0], "float32"))
    differ = 0
    for want, view, changes in zip(host.views, device.views, device.changes, strict=True):
        sent = [each._replace(values=engine.tensor(each.values)) for each in changes]
        found = engine.array(changed(engine.ops, engine.tensor(view), sent))
        differ += int(np.sum(found != want))
    yield Row("bytes of views that differ from Pillow's", differ, most=0)


def _first_batch(spec: RunSpec) -> Batch:
    """A batch of bytes."""
    with Pipeline(spec, open_train(spec)) as pipeline:
        pipeline.as_bytes = True
        return next(iter(pipeline.batches(0, 1)))


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


SPEED = {
    "moco_v3/vit_base": Size(512, plain=256, foreseen=1250.0),
    "moco_v2/resnet50": Size(256, plain=256, overrides=("batch_norm.virtual_ranks=1",)),
    "moca/v1_0_vit_base": Size(256, plain=128, foreseen=1500.0),
}


def speed(check: Check) -> Iterator[Row]:
    """Whole steps in bfloat16 from bytes on the host: time, rate, memory, share of the floor."""
    peak = check.native.ceilings(check.device, 64 if check.small else 8192)["bfloat16"]
    for recipe, size in islice(SPEED.items(), 1 if check.small else None):
        spec = check.sized(recipe, size.images, *size.overrides)
        name, images = DIGITS[0] if check.small else recipe, spec.train.batch_size
        foreseen = None if check.small else size.foreseen
        check.native.peak_memory(check.device)
        seconds = _seconds(check, stepping(check.engine(spec)))
        work = 2 * step_flops(spec) * images
        yield Row(f"{name} batch {images}, ms", 1000 * seconds)
        yield Row(f"{name}, images/s", images / seconds, foreseen=foreseen)
        yield Row(f"{name}, share of the floor", work / seconds / (peak * 1e12))
        yield Row(f"{name}, peak GiB", check.native.peak_memory(check.device))
        plain = check.sized(recipe, size.plain, *size.overrides)
        rate = plain.train.batch_size / _seconds(check, _plain_step(check, plain))
        bar = None if check.device == "cpu" else 1.0
        yield Row(f"{name}, rate over that of a plain loop", images / seconds / rate, least=bar)


def _seconds(check: Check, step: Callable[[], object]) -> float:
    """Seconds of a step after two that warm up."""
    gc.collect()  # the networks of the step before
    step(), step()
    return float(check.native.seconds_of(check.device, step, 2 if check.small else 20))


def _plain_step(check: Check, spec: RunSpec) -> Callable[[], object]:
    """Steps of the benchmark's plain loop in mixed precision, from normalised pinned numbers."""
    module = importlib.import_module(
        f"triptych.backends.{check.backend}.plain.{plain_module(spec)}"
    )
    loop, done = module.PlainLoop(spec, check.native.PRODUCTS["bfloat16"][0]), count()
    batches = [check.native.pinned(check.device, numbers(spec, seed)) for seed in range(2)]

    def step() -> object:
        number = next(done)
        return loop.step(batches[number % 2], hyper(number))

    return step
