"""The inputs and outputs of a training step, and the device and processes that compute it.

Shape letters: N images per batch, C channels, H height, W width, L patches, D feature width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Tensor: TypeAlias = Any
"""A native tensor of the framework."""
Array = NDArray[Any]
Index: TypeAlias = Array | Tensor
"""Positions, int64: an array on the host, or a tensor on the device."""
State = dict[str, Array]
"""Maps each canonical name to an array in the canonical (PyTorch) layout."""


def evenly(size: int, rank: int, count: int) -> slice:
    """The rows of one of ``count`` processes, if all rows are divided as evenly as possible.

    If they do not divide evenly, the first processes have one row more.

    Args:
        size: number of all rows.
        rank: of the process.
    """
    least, more = divmod(size, count)
    start, stop = (r * least + min(r, more) for r in (rank, rank + 1))
    return slice(start, stop)


@dataclass(frozen=True)
class Partners:
    """Images of other copies of the model, which are mixed into those of a batch.

    Attributes:
        images: (M, C, H, W), like a view of a batch.
        labels: (M,) int64.
        rows: (M,) int64, their positions in the step's batch.
    """

    images: Array
    labels: Array
    rows: Array


class Changes(NamedTuple):
    """An operation on some images of a view, which the device makes (``core.methods.colours``).

    Attributes:
        operation: name of the operation.
        rows: (n,) int64, positions of the images.
        values: (n, 3) float32, the numbers of the operation for each of them, then zeros.
    """

    operation: str
    rows: Index
    values: Tensor

    def part(self, start: int, stop: int) -> "Changes":
        """The changes, as arrays, of the images from ``start`` to before ``stop``."""
        inside = (self.rows >= start) & (self.rows < stop)
        return Changes(self.operation, self.rows[inside] - start, self.values[inside])


@dataclass(frozen=True)
class Batch:
    """The images of one step. A method's networks get views and targets as tensors.

    Attributes:
        views: arrays (N, C, H, W), float32, normalised, or uint8 with ``levels``: as many as the
            method has views. With cached features there is one array (N, D) instead.
        index: (N,) int64, the position of each image in the data set.
        labels: (N,) int64, the class of each image; None for a method without labels.
        targets: (N, classes), the probabilities of the classes that the method is to predict; None
            for a method without such targets.
        first: position of the first of these images in the step's batch, which all copies of the
            model share.
        size: number of images of the step's batch; None: these are all of them.
        partners: what ``Method.prepare`` needs of other copies of the model, if anything.
        levels: (3, C, 1, 1) float32, how the device normalises bytes: 255, then mean and deviation
            of each channel (see ``Ops.normalized``). None: the views are normalised.
        changes: of each view, what the device does to its bytes before they are normalised. Empty:
            nothing.
        places: what ``Method.places`` returns, on the device if that is not the host.
    """

    views: tuple[Tensor, ...]
    index: Array
    labels: Array | None = None
    targets: Tensor | None = None
    first: int = 0
    size: int | None = None
    partners: Partners | None = None
    levels: Tensor | None = None
    changes: tuple[tuple[Changes, ...], ...] = ()
    places: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> slice:
        """The rows of the step's batch, and so of its draws, that these images are."""
        return slice(self.first, self.first + len(self.index))

    @property
    def whole_size(self) -> int:
        """Number of images of the step's batch."""
        return len(self.index) if self.size is None else self.size

    def part(self, rows: slice) -> "Batch":
        """The micro-batch of some of these images. rows: counted from the first of these images."""
        labels, targets = (None if x is None else x[rows] for x in (self.labels, self.targets))
        views = tuple(view[rows] for view in self.views)
        start, stop, _ = rows.indices(len(self.index))
        parts = ((each.part(start, stop) for each in view) for view in self.changes)
        changes = tuple(tuple(each for each in view if len(each.rows)) for view in parts)
        first, whole, index = self.first + start, self.whole_size, self.index[rows]
        return Batch(
            views, index, labels, targets, first, whole, levels=self.levels, changes=changes
        )


@dataclass(frozen=True)
class Hyper:
    """The scheduled scalars of one step.

    Attributes:
        step: number of the step, from 0.
        lr: learning rate after the schedule.
        weight_decay: weight decay after the schedule.
        ema: momentum of the teacher's moving average.
    """

    step: int
    lr: float
    weight_decay: float
    ema: float


@dataclass
class Targets:
    """What the student is to predict in one step. No tensor carries a gradient.

    Attributes:
        values: the tensors that ``Method.loss`` needs, by name: an entry for each micro-batch, or
            one for the whole batch if ``Method.WHOLE`` is set.
        metrics: as in ``Outcome``.
        features: as in ``Outcome``.
        kept: as in ``Outcome``.
        tracked: whether the running statistics of the student have moved in this step already.
    """

    values: list[dict[str, Tensor]]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    tracked: bool = False


@dataclass
class Outcome:
    """The loss of a step, or one of the losses that add up to it.

    Attributes:
        loss: scalar to differentiate.
        metrics: scalars to log, by name.
        features: features that parity compares and health measures, by name.
        kept: tensors that ``Method.finish`` needs, by name. The engine takes them from ``Targets``.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Outcome":
        """The outcome after a change of each tensor but those that are kept."""
        metrics, features = (
            {name: change(value) for name, value in values.items()}
            for values in (self.metrics, self.features)
        )
        return Outcome(change(self.loss), metrics, features, self.kept)


@dataclass(frozen=True)
class Context:
    """Where an engine computes.

    Attributes:
        device: "cpu" or "cuda:N".
        precision: as in the spec.
        runs_ahead: whether the host starts a step before the previous step is done. The host then
            reads each loss one step late. The flag is true on an accelerator, and wherever several
            processes train together: a process that stopped by itself within a step would leave
            the others waiting there.
    """

    device: str
    precision: str
    runs_ahead: bool


class Courier(Protocol):
    """Copies to and from a device that has a memory of its own, beside the device's work."""

    def carry(self, arrays: Sequence[Array], /) -> list[Tensor]:
        """The arrays as tensors on the device; floating arrays take the run's precision.

        The copies overlap with what the device computes at the time of the call. What is queued
        later waits for them. The tensors hold their values until the call after the next one.
        """

    def bring(self, tensors: Mapping[str, Tensor], /) -> Callable[[], Mapping[str, Tensor]]:
        """Starts to copy tensors to the host. The result waits for these copies only.

        Args:
            tensors: by name. What is queued for the device after this call does not delay them.
        """


class Group:
    """Processes that exchange tensors, as one of them sees them. No exchange has a gradient.

    All processes of a group make the same calls in the same order. This class itself describes a
    group of one process.

    Attributes:
        rank: number of this process in the group, from 0.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the tensors of all processes, as a new tensor.

        Args:
            x: the same shape on all processes.
        """
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks.

        Args:
            x: (N, ...), the same shape on all processes.

        Returns:
            (count * N, ...).
        """
        return x

    def broadcast(self, x: Tensor) -> None:
        """Sets ``x`` in place to that of the process with rank 0."""


Replicas: TypeAlias = Group
"""The copies of a model that share each batch in data parallelism: copy i has its i-th part."""


class Ranks:
    """The processes that train one spec together, as one of them sees them.

    This class itself describes a single process.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        replicas: the processes that hold the same part of the model, one of each copy.
        norms: those of ``replicas`` whose batch norms share their statistics.
        tensor: the processes that share each divided tensor.
        pipeline: the processes that hold the stages of one copy, in their order.
    """

    rank: int = 0
    world: int = 1
    replicas: Replicas = Group()
    norms: Group = Group()
    tensor: Group = Group()
    pipeline: Group = Group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints to the terminal."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest ``value`` of all ranks. The call waits for all ranks.

        Args:
            value: of this rank, 0 to 2**62.
        """
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag of at least one rank is set. The call waits for all ranks."""
        return self.largest(int(flag)) > 0

    def close(self) -> None:
        """Leaves the processes. No rank waits for this one any more."""


ALONE = Ranks()
"""A single process, which waits for no other."""


class Slot(NamedTuple):
    """One native tensor of the state, with its conversion to and from the canonical array."""

    shape: tuple[int, ...]
    """Canonical shape."""
    read: Callable[[], Array]
    """Returns the canonical array: a copy, never an alias of the live tensor."""
    write: Callable[[Array], None]
    """Sets the live tensor from a canonical array of the same shape."""

    @classmethod
    def counter(cls, owner: object, attribute: str) -> "Slot":
        """The slot of an integer attribute on the host, as an int64 scalar."""
        return cls(
            (),
            lambda: np.array(getattr(owner, attribute), np.int64),
            lambda array: setattr(owner, attribute, int(array)),
        )
