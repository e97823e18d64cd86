"""The features that a protocol evaluates, and where they come from."""

from collections.abc import Callable
from dataclasses import dataclass

from triptych.core.contracts import Array
from triptych.core.engine import Engine
from triptych.core.evaluation.row import RAW_PIXELS

Check = Callable[[], None]


def never() -> None:
    """A check that never breaks an evaluation off."""


@dataclass(frozen=True)
class Subject:
    """Frozen features of one kind.

    Attributes:
        embed: (N, C, H, W) normalised images -> (N, D) features.
        step: optimizer steps that trained the weights.
        branch: "student", "teacher" or "none".
        tokens: which features of the encoder, or "raw pixels".
        check: called between batches; it raises an exception to break the evaluation off.
    """

    embed: Callable[[Array], Array]
    step: int
    branch: str
    tokens: str
    check: Check = never


def encoder(
    engine: Engine, step: int, *, branch: str, tokens: str, check: Check = never
) -> Subject:
    """The final features of an engine's encoder.

    Args:
        branch: as in ``core.engine.Engine.embed``.
        tokens: as in ``core.engine.Engine.embed``.
        check: as in ``Subject``.
    """

    def embed(images: Array) -> Array:
        return engine.embed(images, branch=branch, tokens=tokens)["final"]

    return Subject(embed, step, branch, tokens, check)


def raw_pixels() -> Subject:
    """The normalised pixels as features, a baseline for every encoder."""

    def flatten(images: Array) -> Array:
        return images.reshape(len(images), -1)

    return Subject(flatten, 0, "none", RAW_PIXELS)
