"""What the parts of the check of a GPU share: figures with bars, and batches to compute with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from types import ModuleType

import numpy as np

from triptych.core import config, launch, parameters
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, Batch, Hyper
from triptych.core.data.pixels import normalize
from triptych.core.engine import Engine
from triptych.core.methods import METHODS

DIGITS = ("moco_v3/digits", "moco_v1/digits", "moca/digits")
"""Recipes small enough for float64: a ViT, a ResNet with virtual ranks, a codebook."""
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

    def sized(self, recipe: str, count: int, *overrides: str) -> RunSpec:
        """A recipe in bfloat16 with a batch of ``count`` images; in a dry run, a small one."""
        recipe, count = (DIGITS[0], 8) if self.small else (recipe, count)
        return self.spec(recipe, "bfloat16", f"train.batch_size={count}", *overrides)

    def engine(self, spec: RunSpec) -> Engine:
        """An engine with the spec's first state."""
        return launch.open_engine(spec, self.backend, parameters.initial_state(spec))


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
    batches, done = [pixels(engine.spec, seed) for seed in range(2)], count()

    def step() -> dict[str, object]:
        number = next(done)
        drawn = draws(engine.spec, number)
        return dict(engine.train_step(batches[number % 2], drawn, hyper(number)))

    return step


def draws(spec: RunSpec, step: int) -> Mapping[str, Array]:
    """The random draws of a step."""
    return METHODS[spec.method.name].draws(spec, step)


def hyper(step: int) -> Hyper:
    """Rates of a step, the same in all."""
    return Hyper(step=step, lr=1e-4, weight_decay=0.1, ema=0.99)
