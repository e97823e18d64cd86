"""The ``evaluate`` section: the evaluation of features during training."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from triptych.core.config.fields import (
    Bool,
    KeyedError,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from triptych.core.config.lowshot import LowshotSpec


class ProbeSpec(Section):
    """Linear probe on features that are computed once (evaluation "probe")."""

    penalty: PositiveFloat = 1e-4
    """The classifier W minimises mean CE + penalty/2 |W|^2. Its intercepts cost nothing."""
    iterations: PositiveInt = 200
    """Most iterations of L-BFGS. The result says how many there were."""
    standardize: Bool = True
    """Whether each dimension is scaled to mean 0 and variance 1 over the labelled images."""


class RankSpec(Section):
    """Effective rank of the features (evaluation "rank")."""

    images: PositiveInt = 25600
    """Most training images whose features RankMe (arXiv 2210.02885) takes. They are drawn."""
    view_images: NonNegativeInt = 256
    """Number of training images of which LiDAR (arXiv 2312.04000) takes views. 0: no LiDAR."""
    views: Annotated[PositiveInt, Field(ge=2)] = 4
    """Augmented views of each of these images: augment.view1 and augment.view2 in turn."""


class EvaluateSpec(Section):
    """Evaluation of frozen features during training."""

    protocols: Annotated[tuple[Literal["knn", "probe", "rank"], ...], Field(min_length=1)] = (
        "knn",
    )
    """What is evaluated, on one computation of the features. knn: nearest neighbours. probe: a
    linear probe. rank: the effective rank of the features."""
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
    probe: ProbeSpec = ProbeSpec()
    rank: RankSpec = RankSpec()
    lowshot: LowshotSpec = LowshotSpec()

    def contradictions(self) -> Iterator[KeyedError]:
        """See ``Section``."""
        for name in ("knn", "probe", "rank"):
            if self.protocols.count(name) > 1:
                yield KeyedError("protocols", f"{name} is there twice; name it once")

    @property
    def every_k(self) -> tuple[int, ...]:
        """The numbers of ``k``."""
        return self.k if isinstance(self.k, tuple) else (self.k,)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The numbers of ``temperature``."""
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
