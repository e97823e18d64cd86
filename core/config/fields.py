"""What the sections of a spec are made of: bounded types, and checks between keys."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_validator

Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]
Str = Annotated[str, Strict()]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
# Bounds beyond which nothing is meant seriously, and building it would take for ever.
PositiveInt = Annotated[Int, Field(gt=0, le=10**9)]
NonNegativeInt = Annotated[Int, Field(ge=0, le=10**9)]
Pixels = Annotated[Int, Field(gt=0, le=8192)]
Width = Annotated[Int, Field(gt=0, le=65536)]
Depth = Annotated[Int, Field(gt=0, le=1024)]
Threads = Annotated[Int, Field(gt=0, le=1024)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Probability = Annotated[Float, Field(ge=0, le=1)]
OpenFraction = Annotated[Float, Field(gt=0, lt=1)]
Fraction = Annotated[Float, Field(gt=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]
"""Of a running mean that divides by 1 - decay."""

# Not Literal[1, 2, 3, 4] and Literal[1]: those take true and 1.0 for 1.
Channels = Annotated[Int, Field(ge=1, le=4)]
SixteenBits = Annotated[Int, Field(ge=8, le=16)]
"""Of which samples stored in 16 bits make use."""
One = Annotated[Int, Field(ge=1, le=1)]


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("expected [low, high] with low <= high")
    return pair


PositiveInterval = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ascending)]
NonNegativeInterval = Annotated[
    tuple[NonNegativeFloat, NonNegativeFloat], AfterValidator(_ascending)
]
FractionInterval = Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]


class KeyedError(ValueError):
    """A contradiction between keys, reported at the key that should change."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key
        """Dotted, relative to the section that found it."""


class Contradictions(ValueError):
    """Everything that one section found."""

    def __init__(self, found: list[KeyedError]) -> None:
        super().__init__("; ".join(f"{error.key}: {error}" for error in found))
        self.found = found


class Section(BaseModel):
    """A mapping of the spec; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def contradictions(self) -> Iterator[KeyedError]:
        """What is wrong between keys that are each valid by themselves."""
        return iter(())

    @model_validator(mode="after")
    def _without_contradictions(self) -> "Section":
        found = list(self.contradictions())
        if found:
            raise Contradictions(found)
        return self
