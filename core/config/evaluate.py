"""The ``evaluate`` section: the evaluation of features during training."""

from typing import Annotated, Literal

from pydantic import Field

from triptych.core.config.fields import NonNegativeInt, PositiveFloat, PositiveInt, Section
from triptych.core.config.lowshot import LowshotSpec


class EvaluateSpec(Section):
    """k-NN classification on frozen features during training."""

    every: NonNegativeInt = 0
    """Steps between evaluations. The end of the run has one, too. 0: no evaluation."""
    k: PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = 20
    """Number of neighbours that vote. Of a list, the first number gives the headline result."""
    temperature: PositiveFloat | Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = 0.07
    """The weight of a neighbour's vote is exp(cosine similarity / temperature). Of a list, the
    first number gives the headline result; each number goes with each k."""
    branch: Literal["student", "teacher"] = "student"
    tokens: Literal["cls", "mean"] = "cls"
    """The feature of an image. cls: the class token. mean: the mean of the patch tokens."""
    per_class: tuple[PositiveInt, ...] = (10,)
    """Numbers of labelled images per class, one for each further evaluation. The first evaluation
    uses all labels. A number is skipped if no class has more images."""
    lowshot: LowshotSpec = LowshotSpec()

    @property
    def every_k(self) -> tuple[int, ...]:
        """The numbers of ``k``."""
        return self.k if isinstance(self.k, tuple) else (self.k,)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The numbers of ``temperature``."""
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
