"""The ``evaluate`` section: what features are judged by while training."""

from typing import Literal

from triptych.core.config.fields import NonNegativeInt, PositiveFloat, PositiveInt, Section


class EvaluateSpec(Section):
    """k-NN on frozen features while training."""

    every: NonNegativeInt = 0
    """Steps between evaluations, and one at the end; 0: never."""
    k: PositiveInt = 20
    """Neighbours that vote."""
    temperature: PositiveFloat = 0.07
    """A neighbour's vote weighs exp(cosine similarity / temperature)."""
    branch: Literal["student", "teacher"] = "student"
    tokens: Literal["cls", "mean"] = "cls"
    """The feature: the class token, or the mean of the patch tokens."""
    per_class: tuple[PositiveInt, ...] = (10,)
    """Besides all labels: evaluations with so many labelled images per class, where a class has
    more than that."""
