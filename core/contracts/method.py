"""What a method owes the engine, the training loop and the reports."""

from collections.abc import Mapping
from typing import Protocol, TypeVar

from triptych.core.config.spec import RunSpec
from triptych.core.contracts.ops import Ops
from triptych.core.contracts.step import Array, Hyper, Outcome, Tensor

ModelT = TypeVar("ModelT", contravariant=True)
SectionT = TypeVar("SectionT", contravariant=True)


class Method(Protocol[ModelT, SectionT]):
    """What a method does beyond its tensors; a module of ``core.methods``.

    Type parameters: the networks that its step needs, and its section of the spec.
    """

    FLAT: float
    """Spread below which a loss at chance is a collapse."""
    REMEDY: str
    """What helps against a collapse, besides a lower learning rate."""
    CHANCE: str
    """How the summary of a spec tells the chance level, which takes the place of "{:.4f}"."""

    def chance(self, spec: RunSpec, /) -> float:
        """The loss of features that tell no image from another; > 0."""

    def settled(self, spec: RunSpec, /) -> int:
        """Steps at the start whose loss tells nothing about the features."""

    def spread(self, values: Mapping[str, float], /) -> float:
        """How well images are told apart, from the metrics of a step."""

    def status(self, values: Mapping[str, float], /) -> list[str]:
        """What the method adds to the line of a logged step, from its metrics."""

    def draws(self, spec: RunSpec, step: int, /) -> dict[str, Array]:
        """The random numbers of a step beyond its views, by name."""

    def check_draws(self, spec: RunSpec, draws: Mapping[str, Array], /) -> None:
        """Raises ValueError for draws of the right names, shapes and types that no run could draw.

        For draws that come from elsewhere.
        """

    def forward(
        self,
        ops: Ops,
        model: ModelT,
        views: tuple[Tensor, ...],
        draws: Mapping[str, Array],
        hyper: Hyper,
        spec: SectionT,
        /,
    ) -> Outcome:
        """The forward pass of one step, the move of the teacher included.

        Args:
            views: two of (N, C, H, W).
        """

    def finish(self, model: ModelT, outcome: Outcome, /) -> None:
        """What is left to do after the update; no gradient is recorded."""
