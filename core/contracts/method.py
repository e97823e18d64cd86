"""The functions that a method provides to the engine, the training loop and the reports."""

from collections.abc import Mapping
from typing import Protocol, TypeVar

from triptych.core.config.spec import RunSpec
from triptych.core.contracts.ops import Ops
from triptych.core.contracts.step import Array, Batch, Hyper, Outcome

ModelT = TypeVar("ModelT", contravariant=True)
SectionT = TypeVar("SectionT", contravariant=True)


class Method(Protocol[ModelT, SectionT]):
    """The part of a method that needs no framework. A module of ``core.methods``.

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

    def forward(
        self,
        ops: Ops,
        model: ModelT,
        batch: Batch,
        draws: Mapping[str, Array],
        hyper: Hyper,
        spec: SectionT,
        /,
    ) -> Outcome:
        """The forward pass of one step. It updates a teacher that follows the student's past.

        Args:
            batch: views and targets are tensors.
        """

    def finish(self, model: ModelT, outcome: Outcome, hyper: Hyper, /) -> None:
        """The work after the optimizer's update. The framework records no gradient here."""
