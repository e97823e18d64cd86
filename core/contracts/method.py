"""The functions that a method provides to the engine, the training loop and the reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from triptych.core.config.spec import RunSpec
from triptych.core.contracts.ops import Ops
from triptych.core.contracts.step import Array, Batch, Hyper, Outcome, Replicas, Targets

ModelT = TypeVar("ModelT")
SectionT = TypeVar("SectionT")


@dataclass(frozen=True)
class Step(Generic[ModelT, SectionT]):
    """What the functions of a method work with in one step.

    Attributes:
        ops: the tensor operations.
        model: the networks and the memory.
        spec: the method's section of the spec.
        draws: the random numbers of the step, by name.
        hyper: the scheduled scalars of the step.
        replicas: the copies of the model that share the batch.
        monitored: whether the step is logged, so that metrics which cost time are wanted.
    """

    ops: Ops
    model: ModelT
    spec: SectionT
    draws: Mapping[str, Array]
    hyper: Hyper
    replicas: Replicas
    monitored: bool = True


class Method(Protocol[ModelT, SectionT]):
    """The part of a method that needs no framework. A module of ``core.methods``.

    A step calls ``prepare`` and ``places``, then ``targets``, then ``predict`` and ``loss`` for
    each loss and micro-batch (see ``core.methods.accumulate``), and ``finish`` after the
    optimizer's update.

    Type parameters:
        ModelT: the networks that the method's step needs.
        SectionT: the method's section of the spec.
    """

    FLAT: float
    """Feature spread below which a loss at chance means a collapse; 0: there is no collapse."""
    REMEDY: str
    """Advice against a collapse, besides a lower learning rate."""
    CHANCE: str
    """Text about the chance level in the summary of a spec. The level replaces "{:.4f}"."""
    LOSSES: int
    """Number of losses whose sum is the loss of a step. Each is differentiated before the features
    of the next one are computed, so the activations of one of them at a time are in memory."""
    WHOLE: bool
    """Whether ``loss`` needs the features of the whole batch, since batch norm in the heads joins
    its images. If not, the loss of a batch is the mean of the losses of its micro-batches."""

    def chance(self, spec: RunSpec, /) -> float:
        """The chance level: the loss of features that do not distinguish images; > 0."""

    def settled(self, spec: RunSpec, /) -> int:
        """Number of steps at the start whose loss says nothing about the features."""

    def judged(self, values: Mapping[str, float], /) -> float:
        """The loss that shows the health of the run, from the metrics of a step."""

    def spread(self, values: Mapping[str, float], /) -> float:
        """The spread of the features over images, from the metrics of a step."""

    def status(self, values: Mapping[str, float], /) -> list[str]:
        """The method's additions to the terminal line of a logged step, from its metrics."""

    def draws(self, spec: RunSpec, step: int, /) -> dict[str, Array]:
        """The random numbers of a step, by name, without those of the augmented views."""

    def check_draws(self, spec: RunSpec, draws: Mapping[str, Array], /) -> None:
        """Checks the values of draws that a file supplies.

        Args:
            spec: of the run.
            draws: arrays whose names, shapes and types are right.

        Raises:
            ValueError: ``draws`` could never return these values.
        """

    def prepare(self, batch: Batch, draws: Mapping[str, Array], spec: SectionT, /) -> Batch:
        """The batch as the forward pass needs it. The work is done on the host, on arrays."""

    def places(
        self, step: Step[ModelT, SectionT], part: Batch, batch: Batch, /
    ) -> dict[str, Array]:
        """What ``targets``, ``predict`` and ``loss`` need of draws and labels, by name.

        The arrays are made on the host, and reach the device with the images. So no copy to the
        device interrupts the computation.

        Args:
            part: a micro-batch, or the whole batch.
            batch: the images of this copy of the model, with arrays. What concerns all of them is
                needed with the first micro-batch only.

        Returns:
            Arrays of int64, or floating arrays.
        """

    def targets(self, step: Step[ModelT, SectionT], parts: Sequence[Batch], /) -> Targets:
        """What the student is to predict, without gradient.

        It updates a teacher that follows the student's past.

        Args:
            parts: the micro-batches in order, with tensors and places.
        """

    def predict(self, step: Step[ModelT, SectionT], part: Batch, number: int, /) -> Any:
        """The student's features of a micro-batch: a tensor (N, D) if ``WHOLE`` is set.

        Args:
            part: with tensors.
            number: of the loss, from 0.
        """

    def loss(
        self,
        step: Step[ModelT, SectionT],
        part: Batch,
        features: Any,
        targets: Mapping[str, Any],
        number: int,
        /,
    ) -> Outcome:
        """One of the losses of a micro-batch, or of the whole batch if ``WHOLE`` is set.

        Args:
            part: the images of the features.
            features: of ``predict``.
            targets: the entry of ``Targets.values`` for these images.
            number: of the loss, from 0.
        """

    def finish(self, model: ModelT, outcome: Outcome, hyper: Hyper, /) -> None:
        """The work after the optimizer's update. The framework records no gradient here."""
