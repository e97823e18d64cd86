"""The batches that a loader makes. Each batch is a pure function of its number."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core.config.spec import FinetuneSpec, RunSpec
from triptych.core.contracts import evenly
from triptych.core.data import augment, deferred, pixels, views
from triptych.core.data.decode import NOTES, DamagedImage
from triptych.core.data.source import Source
from triptych.core.errors import UserError, printable
from triptych.core.methods import mixing
from triptych.core.random import stream

Planes: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class Filled:
    """A loaded batch without its pixels.

    Attributes:
        index: (N,) int64, indices of the images in the source.
        damaged: names of files that could not be read, in the order in which they were met.
        warned: (file name, text) of each warning of a library.
        epoch: of a training batch.
        draws: (N,) int64, of a training batch: number of each image's random draws in its epoch.
        first: position of the first image in the step's batch, which all copies of the model share.
        size: number of images of the step's batch.
        partners: positions in the step's batch of the last of these images, which are those of
            other copies and only mixed into the images before them.
        changes: (views, N, length, WIDTH) of ``deferred``, what the device does to the views.
    """

    index: NDArray[np.int64]
    damaged: tuple[str, ...] = ()
    warned: tuple[tuple[str, str], ...] = ()
    epoch: int = 0
    draws: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    first: int = 0
    size: int | None = None
    partners: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    changes: NDArray[np.float32] | None = None


class Job(Protocol):
    """Batches by number; picklable, and the same in every process."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the pixels of one batch."""

    def fill(self, number: int, out: Planes) -> Filled:
        """Loads one batch into ``out``, an array of ``shape``.

        Raises:
            UserError: a file is damaged, and the spec does not allow to skip it.
        """


@dataclass(frozen=True)
class Training:
    """Augmented views of each image, in a new order each epoch.

    The number of a batch is the optimizer step. The images left over at the end of an epoch are
    dropped, or make a smaller batch: see ``train.drop_last``.

    Attributes:
        copy: number of the copy of the model whose images are loaded.
        copies: number of copies that share each batch.
    """

    spec: RunSpec
    source: Source
    copy: int = 0
    copies: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in one epoch."""
        return self.spec.train.steps_per_epoch(len(self.source))

    @property
    def shape(self) -> tuple[int, ...]:
        """(views, N, C, H, W)."""
        batch = self.spec.train.batch_size
        own = -(-batch // self.copies)
        return (
            self.spec.method.views,
            min(2 * own, batch) if self._mixes else own,
            self.spec.data.channels,
            *self.spec.model.size,
        )

    def fill(self, number: int, out: Planes) -> Filled:
        """See ``Job``.

        A damaged image that may be skipped is replaced by the next readable one in the epoch's
        order, in which the first follows the last. The replacement uses the damaged sample's draws,
        so it differs from its own regular occurrence, which may be in this batch.
        """
        epoch, batch = divmod(number, self.steps_per_epoch)
        repeats, first = self.spec.augment.repeats, batch * self.spec.train.batch_size
        order = epoch_order(self.spec.seed, epoch, len(self.source), repeats)
        size = min(self.spec.train.batch_size, len(order) - first)
        own = evenly(size, self.copy, self.copies)
        partners = self._partners(number, size, own)
        positions = [first + int(row) for row in (*range(own.start, own.stop), *partners)]
        index, draws = np.empty((2, len(positions)), np.int64)
        damaged, warned = list[str](), list[tuple[str, str]]()
        changes = self._changes(len(positions))
        for row, position in enumerate(positions):
            image, index[row], lost = self._readable(order, position)
            draws[row] = order[position] * repeats + position % repeats
            damaged += lost
            warned += _warnings(self.source, int(index[row]), image)
            with memory_for(self.source, int(index[row])):
                self._write_views(image, epoch, int(draws[row]), out[:, row], changes[:, row])
        names, texts = tuple(damaged), tuple(warned)
        kept = changes if self.spec.augment.on_device else None
        return Filled(index, names, texts, epoch, draws, own.start, size, partners, kept)

    def _changes(self, count: int) -> NDArray[np.float32]:
        """A table of the changes that the device makes, without any yet."""
        recipe = self.spec.augment
        views_ = (recipe.view1, recipe.view2)[: self.spec.method.views]
        return np.zeros(
            (len(views_), count, max(map(deferred.length, views_)), deferred.WIDTH), np.float32
        )

    @property
    def _mixes(self) -> bool:
        """Whether images are mixed with those of other copies of the model."""
        method = self.spec.method
        return self.copies > 1 and isinstance(method, FinetuneSpec) and method.mixing.mixes

    def _partners(self, step: int, size: int, own: slice) -> NDArray[np.int64]:
        """Positions in a batch of ``size`` images of what is mixed into this copy's images."""
        if not self._mixes:
            return np.empty(0, np.int64)
        spec, method = self.spec, cast(FinetuneSpec, self.spec.method)
        batch, pixels = spec.train.batch_size, spec.model.size
        draws = mixing.draws(method.mixing, spec.seed, step, batch, pixels)
        return mixing.missing(mixing.first(draws, size)["mix_partner"], own)

    def _write_views(
        self,
        image: Image.Image,
        epoch: int,
        draws: int,
        out: Planes,
        table: NDArray[np.float32],
    ) -> None:
        """Writes the views, and what is left to the device.

        Args:
            draws: as in ``Filled``.
            out: (views, C, H, W).
            table: (views, length, WIDTH).
        """
        recipe, size = self.spec.augment, self.spec.model.size
        for number, ops in enumerate((recipe.view1, recipe.view2)[: len(out)]):
            generator = stream(self.spec.seed, "augment", epoch, draws, number)
            changes = augment.draw(ops, generator, (image.height, image.width), size)
            if recipe.on_device:
                changes, rest = deferred.divided(changes)
                deferred.write_table(rest, table[number])
            views.write(image, changes, out[number], recipe.engine)

    def _readable(
        self, order: NDArray[np.int64], position: int
    ) -> tuple[Image.Image, int, list[str]]:
        """The first readable image from ``position`` on, its index, and skipped files' names."""
        damaged: list[str] = []
        for index in _from(order, position):
            try:
                with memory_for(self.source, index):
                    return self.source.image(index), index, damaged
            except DamagedImage:
                if self.spec.data.on_error == "stop":
                    raise
                damaged.append(self.source.name(index))
        count = len(np.unique(order))
        raise UserError(
            f"data: all {count} images are damaged; the first is {printable(damaged[0])}; "
            "repair or replace them"
        )


@dataclass(frozen=True)
class Evaluation:
    """Every image once, in the order of the source, resized and cropped to its middle."""

    spec: RunSpec
    source: Source
    batch_size: int

    def __len__(self) -> int:
        """Number of batches; the last one may be smaller."""
        return -(-len(self.source) // self.batch_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return self.batch_size, self.spec.data.channels, *self.spec.model.size

    def fill(self, number: int, out: Planes) -> Filled:
        """See ``Job``. Damaged images that may be skipped are left out, and later rows move up."""
        first, change = number * self.batch_size, self._change()
        index, damaged = list[int](), list[str]()
        warned: list[tuple[str, str]] = []
        for candidate in range(first, min(first + self.batch_size, len(self.source))):
            try:
                with memory_for(self.source, candidate):
                    image = self.source.image(candidate)
                    views.write(image, [change], out[len(index)])
            except DamagedImage:
                if self.spec.data.on_error == "stop":
                    raise
                damaged.append(self.source.name(candidate))
                continue
            warned += _warnings(self.source, candidate, image)
            index.append(candidate)
        return Filled(np.array(index, np.int64), tuple(damaged), tuple(warned))

    def _change(self) -> augment.Change:
        """What makes the view of every image."""
        recipe, size = self.spec.augment, self.spec.model.size
        if recipe.eval_resize is None:
            return partial(pixels.center_crop, size=size, rounding=recipe.eval_rounding)
        return partial(
            pixels.center_cover,
            size=size,
            factor=recipe.eval_resize,
            interpolation=recipe.eval_interpolation,
            rounding=recipe.eval_rounding,
        )


@dataclass(frozen=True)
class Views:
    """Augmented views of some images; each batch is one image.

    Attributes:
        index: (N,) int64, positions in the source.
        views: number of views; the recipes ``augment.view1`` and ``augment.view2`` take turns.
        name: of the random stream that draws the views.
    """

    spec: RunSpec
    source: Source
    index: NDArray[np.int64]
    views: int
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(views, C, H, W)."""
        return self.views, self.spec.data.channels, *self.spec.model.size

    def fill(self, number: int, out: Planes) -> Filled:
        """See ``Job``. The batch of a damaged image that may be skipped has no index."""
        index, recipe = int(self.index[number]), self.spec.augment
        try:
            with memory_for(self.source, index):
                image = self.source.image(index)
                for view in range(self.views):
                    generator = stream(self.spec.seed, self.name, index, view)
                    ops = (recipe.view1, recipe.view2)[view % 2]
                    here, size = (image.height, image.width), self.spec.model.size
                    changes = augment.draw(ops, generator, here, size)
                    views.write(image, changes, out[view], recipe.engine)
        except DamagedImage:
            if self.spec.data.on_error == "stop":
                raise
            return Filled(np.empty(0, np.int64), (self.source.name(index),))
        return Filled(self.index[number : number + 1])


@contextmanager
def memory_for(source: Source, index: int) -> Iterator[None]:
    """Names the image in the error if memory runs out inside.

    Raises:
        UserError: replaces MemoryError. ``data.on_error: skip`` does not skip the image: the
            training data must not depend on the machine's free memory.
    """
    try:
        yield
    except MemoryError as error:
        raise UserError(
            f"{printable(source.name(index))}: not enough memory for this image; make it smaller, "
            "or set data.max_pixels below its size and data.on_error: skip"
        ) from error


def _warnings(source: Source, index: int, image: Image.Image) -> list[tuple[str, str]]:
    return [(source.name(index), text) for text in image.info.get(NOTES, ())]


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int, repeats: int = 1) -> NDArray[np.int64]:
    """Indices of the images in the order of one epoch, (count,).

    Args:
        repeats: number of times that each image comes, one after the other. Only the first images
            of the order come then, so that the epoch keeps its length.
    """
    return stream(seed, "order", epoch).permutation(count).repeat(repeats)[:count]


def _from(order: NDArray[np.int64], position: int) -> Iterator[int]:
    """All indices of the order, from ``position`` to its end, then from its start."""
    for offset in range(len(order)):
        yield int(order[(position + offset) % len(order)])
