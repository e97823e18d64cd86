"""The building blocks of the spec's sections: bounded types, and checks between keys."""

from collections.abc import Iterator
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_validator

Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]
Str = Annotated[str, Strict()]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
# A larger value is surely a mistake, and a model of that size would take for ever to build.
PositiveInt = Annotated[Int, Field(gt=0, le=10**9)]
NonNegativeInt = Annotated[Int, Field(ge=0, le=10**9)]
Pixels = Annotated[Int, Field(gt=0, le=8192)]
Width = Annotated[Int, Field(gt=0, le=65536)]
Depth = Annotated[Int, Field(gt=0, le=1024)]
Threads = Annotated[Int, Field(gt=0, le=1024)]
PositiveFloat = Annotated[Float, Field(gt=0)]
Ratio = Annotated[Float, Field(gt=0, le=1024)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Probability = Annotated[Float, Field(ge=0, le=1)]
OpenFraction = Annotated[Float, Field(gt=0, lt=1)]
Fraction = Annotated[Float, Field(gt=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]
"""Decay of a running mean, which divides by 1 - decay."""

Byte = Annotated[Int, Field(ge=0, le=255)]
# Literal[1, 2, 3, 4] and Literal[1] would accept true and 1.0 as 1.
Channels = Annotated[Int, Field(ge=1, le=4)]
SixteenBits = Annotated[Int, Field(ge=8, le=16)]
"""Number of bits that samples use which are stored in 16 bits."""


Pair = TypeVar("Pair", tuple[float, float], tuple[int, int])


def _ascending(pair: Pair) -> Pair:
    if pair[0] > pair[1]:
        raise ValueError("expected [low, high] with low <= high")
    return pair


PositiveInterval = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ascending)]
NonNegativeInterval = Annotated[
    tuple[NonNegativeFloat, NonNegativeFloat], AfterValidator(_ascending)
]
CountInterval = Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_ascending)]
FractionInterval = Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]


class KeyedError(ValueError):
    """A contradiction between keys, reported at the key that should change.

    Attributes:
        key: dotted name of the key, relative to the section that reports the error.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Contradictions(ValueError):
    """All contradictions of one section."""

    def __init__(self, found: list[KeyedError]) -> None:
        super().__init__("; ".join(f"{error.key}: {error}" for error in found))
        self.found = found


class Section(BaseModel):
    """A mapping of the spec. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def contradictions(self) -> Iterator[KeyedError]:
        """The contradictions between keys whose values are valid separately."""
        return iter(())

    @model_validator(mode="after")
    def _without_contradictions(self) -> "Section":
        errors = list(self.contradictions())
        if errors:
            raise Contradictions(errors)
        return self
