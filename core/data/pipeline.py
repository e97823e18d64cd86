"""Makes normalised batches of a source, for training and for evaluation."""

import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from math import prod
from types import TracebackType
from typing import cast

import numpy as np
from numpy.typing import NDArray

from triptych.core.config.spec import FinetuneSpec, RunSpec, SupervisedSpec
from triptych.core.contracts import ALONE, Batch, Partners, Replicas
from triptych.core.data.compiled import building
from triptych.core.data.deferred import grouped
from triptych.core.data.erasing import erased_bytes, needs_noise, normalized
from triptych.core.data.jobs import Evaluation, Filled, Planes, Training, Views
from triptych.core.data.pixels import normalize
from triptych.core.data.source import Source
from triptych.core.data.views import check_engine
from triptych.core.data.workers import load
from triptych.core.errors import UserError, printable
from triptych.core.random import stream


class Pipeline:
    """The batches of a run.

    A batch is a pure function of the seed and the step. So loading can begin at any step, and the
    number of workers changes only the time of loading.

    Attributes:
        steps_per_epoch: batches per pass over the data.
        waited: seconds that consumers have waited for batches so far.
        as_bytes: whether views stay uint8, for a device that normalises them itself. They take a
            quarter of the bytes to it, and the values are the same bit for bit. Without effect
            where the host computes with normalised pixels: it mixes images, or erases with noise.
    """

    as_bytes = False

    def __init__(self, spec: RunSpec, source: Source, replicas: Replicas = ALONE.replicas) -> None:
        """Prepares the batches of one copy of the model.

        Args:
            replicas: the copies that share each batch.

        Raises:
            UserError: the source has fewer images than a batch, or its last batch has fewer than
                copies, or it lacks labels; the package of ``augment.engine`` is missing.
        """
        check_engine(spec.augment.engine)
        if spec.method.labelled:
            check_labels(spec, source)
        self._job = Training(spec, source, replicas.rank, replicas.count)
        self.steps_per_epoch = self._job.steps_per_epoch
        if not self.steps_per_epoch:
            raise UserError(
                f"train.batch_size: {spec.train.batch_size} is more than the {len(source)} images "
                "of the training split; lower it"
            )
        if 0 < (last := len(source) % spec.train.batch_size) < replicas.count:
            if not spec.train.drop_last:
                raise UserError(
                    f"train.drop_last: false: the last batch of an epoch has {last} images, which "
                    f"parallel.data {replicas.count} copies cannot share; set it to true"
                )
        self.waited = 0.0
        self._skipped: dict[str, None] = {}
        self._warned: dict[str, str] = {}
        self._running: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()

    @property
    def skipped(self) -> list[str]:
        """Names of the damaged files met so far, each once."""
        return list(self._skipped)

    @property
    def warned(self) -> list[tuple[str, str]]:
        """(file name, first warning of a library) so far, each file once.

        The images of these files were read.
        """
        return list(self._warned.items())

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of the steps ``start`` … ``stop - 1``, 0-based, over all epochs.

        Worker processes start with the first batch. They end after the last one, when the iterator
        is dropped, or with ``close``.

        Raises:
            UserError: a file is damaged (see ``data.on_error``), or a worker died.
        """
        running = self._load(start, stop)
        self._running.add(running)
        return running

    def _load(self, start: int, stop: int) -> Generator[Batch, None, None]:
        data = self._job.spec.data
        asked = time.perf_counter()
        steps = range(start, stop)
        with building(prod(self._job.shape) * len(steps)):
            for batch in load(self._job, steps, data.workers, data.prefetch, self._finish):
                self.waited += time.perf_counter() - asked
                yield batch
                asked = time.perf_counter()

    def _finish(self, planes: Planes, filled: Filled) -> Batch:
        spec, source = self._job.spec, self._job.source
        as_bytes = self.as_bytes or spec.augment.on_device
        levels = self._levels() if as_bytes and _bytes_serve(spec) else None
        views = [
            self._view(number, planes[number], filled, raw=levels is not None)
            for number in range(len(planes))
        ]
        own = len(filled.index) - len(filled.partners)
        self._skipped |= dict.fromkeys(filled.damaged)
        for name, text in filled.warned:
            self._warned.setdefault(name, text)
        index, first, size = filled.index[:own], filled.first, filled.size
        changes = () if filled.changes is None else tuple(map(grouped, filled.changes))
        if not spec.method.labelled:
            return Batch(
                tuple(views), index, first=first, size=size, levels=levels, changes=changes
            )
        labels, partners = labels_of(source, filled.index), None
        if len(filled.partners):
            partners = Partners(views[0][own:], labels[own:], filled.partners)
        own_views = tuple(view[:own] for view in views)
        return Batch(own_views, index, labels[:own], None, first, size, partners, levels, changes)

    def _levels(self) -> NDArray[np.float32]:
        """See ``Batch.levels``."""
        augment, channels = self._job.spec.augment, self._job.spec.data.channels
        rows = (np.array(value, np.float32) for value in (255, augment.mean, augment.std))
        return np.stack([np.broadcast_to(r, channels) for r in rows]).reshape(3, channels, 1, 1)

    def _view(
        self, number: int, planes: Planes, filled: Filled, *, raw: bool
    ) -> NDArray[np.float32] | Planes:
        """One view of each image, erased where the spec says so, and normalised unless ``raw``."""
        planes = planes[: len(filled.index)]
        spec = self._job.spec
        ops = (spec.augment.view1, spec.augment.view2)[number]

        def generator(row: int) -> np.random.Generator:
            return stream(spec.seed, "erase", filled.epoch, int(filled.draws[row]), number)

        if raw:
            return erased_bytes(planes, spec.augment, ops, generator)
        return normalized(planes, spec.augment, ops, generator)

    def close(self) -> None:
        """Ends the worker processes and the iterators that are still in use."""
        for running in list(self._running):
            running.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _bytes_serve(spec: RunSpec) -> bool:
    """Whether the host needs no normalised pixels."""
    recipes = (spec.augment.view1, spec.augment.view2)[: spec.method.views]
    noisy = any(needs_noise(ops) for ops in recipes)
    return not (noisy or isinstance(spec.method, FinetuneSpec))


def labels_of(source: Source, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """The labels of images, -1 for no label. (N,) -> (N,)."""
    return np.array([source.label(int(i)) for i in index], np.int64)


def check_labels(spec: RunSpec, source: Source) -> None:
    """Raises UserError unless each image has one of the classes of a labelled method's spec."""
    method = cast(SupervisedSpec, spec.method)
    labels = labels_of(source, np.arange(len(source)))
    if not len(source.classes) or (labels < 0).any():
        raise UserError(
            f"method.name: {spec.method.name} learns from labels, and data.name {spec.data.name} "
            "as it is given has images without a label; use class folders or a list with labels"
        )
    if len(source.classes) == 1:
        raise UserError(
            f"data: all {len(labels)} training images are of one class, "
            f"{printable(source.classes[0])}; a classifier needs two at least"
        )
    if len(source.classes) != method.classes:
        raise UserError(
            f"method.classes: {method.classes}, but the training images have "
            f"{len(source.classes)} classes; set method.classes to {len(source.classes)}"
        )
    counts = np.bincount(labels, minlength=method.classes)
    if not counts.all():
        name = printable(source.classes[int(counts.argmin())])
        raise UserError(f"data: class {name} has no training image; add some, or remove the class")


def indexed_batches(
    spec: RunSpec,
    source: Source,
    batch_size: int,
    skipped: list[str] | None = None,
    warned: dict[str, str] | None = None,
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Every image of a source once, in order, prepared for evaluation.

    Each image is resized to just cover ``augment.eval_resize`` times the model's image
    size, then cropped to its middle. At 1.0 nothing is cropped from an image of the model's
    proportions.

    Args:
        skipped: gets the names of the damaged files that ``data.on_error: skip`` leaves out.
        warned: gets file name -> text of a library's warning.

    Returns:
        Pairs of

        - images (n, C, H, W), normalised,
        - their positions in the source (n,).

        n is ``batch_size``, or smaller in the last batch and in batches with damaged files. No
        batch is empty.

    Raises:
        UserError: a file is damaged, no image can be read, or a worker died.
    """
    lost: list[str] = []
    warnings: dict[str, str] = {} if warned is None else warned
    count, counted = 0, 0
    for images, index in shared_batches(spec, source, batch_size, 0, 1, lost, warnings):
        if skipped is not None:
            skipped.extend(lost[counted:])
        counted, count = len(lost), count + len(index)
        # On an empty batch frameworks return NaN or even end the process.
        if len(index):
            yield images, index
    if lost and not count:
        raise nothing_readable(source, lost)


def shared_batches(
    spec: RunSpec,
    source: Source,
    batch_size: int,
    rank: int,
    count: int,
    skipped: list[str],
    warned: dict[str, str],
) -> Generator[tuple[NDArray[np.float32], NDArray[np.int64]], None, None]:
    """``indexed_batches`` of one of several processes: each ``count``-th, from ``rank`` on.

    A batch is empty if all its images are damaged.
    """
    augment = spec.augment

    def finish(planes: Planes, filled: Filled) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        skipped.extend(filled.damaged)
        warned.update(filled.warned)
        images = normalize(planes[: len(filled.index)], augment.mean, augment.std)
        return images, filled.index

    job = Evaluation(spec, source, batch_size)
    numbers = range(rank, len(job), count)
    yield from load(job, numbers, spec.data.workers, spec.data.prefetch, finish)


def nothing_readable(source: Source, damaged: Sequence[str]) -> UserError:
    """The error for a source without an image that can be read."""
    return UserError(
        f"evaluation: all {len(source)} images are damaged; the first is {printable(damaged[0])}; "
        "repair or replace them"
    )


def augmented_views(
    spec: RunSpec, source: Source, index: NDArray[np.int64], views: int, name: str
) -> Iterator[NDArray[np.float32]]:
    """Augmented views of some images, one image at a time. Damaged images may be left out.

    Args:
        index: (N,) positions in the source.
        views: as in ``Views``.
        name: as in ``Views``.

    Yields:
        (views, C, H, W), normalised.

    Raises:
        UserError: a file is damaged (see ``data.on_error``), or a worker died.
    """
    augment = spec.augment
    check_engine(augment.engine)

    def finish(planes: Planes, filled: Filled) -> NDArray[np.float32] | None:
        return normalize(planes, augment.mean, augment.std) if len(filled.index) else None

    job = Views(spec, source, index, views, name)
    for images in load(job, range(len(index)), spec.data.workers, spec.data.prefetch, finish):
        if images is not None:
            yield images


def evaluation_batches(
    spec: RunSpec,
    source: Source,
    batch_size: int,
    skipped: list[str] | None = None,
    warned: dict[str, str] | None = None,
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """``indexed_batches``, with labels (n,) in the place of positions; -1 stands for no label."""
    for images, index in indexed_batches(spec, source, batch_size, skipped, warned):
        yield images, labels_of(source, index)
