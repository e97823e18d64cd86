"""Where a file of each format holds its encoders, and what else such a file may hold."""

from collections.abc import Collection, Mapping
from typing import NamedTuple


class Encoders(NamedTuple):
    """The names of a format's encoders.

    Patterns are those of ``named``.

    Attributes:
        branches: "student" or "teacher" -> prefix of the encoder's names. The rest of such a name
            is canonical.
        heads: patterns of that rest for what is no part of the encoder.
        others: patterns of all further names.
    """

    branches: Mapping[str, str]
    heads: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


HEADS = (
    *("projector.", "predictor.", "classifier."),
    *("decoder.", "image_predictor.", "dense_predictor."),
)
CANONICAL = Encoders(
    {"student": "student.encoder.", "teacher": "teacher.encoder."},
    others=(
        *(f"{branch}.{head}" for branch in ("student", "teacher") for head in HEADS),
        *("memory.", "optimizer."),
    ),
)
"""The canonical names."""


def named(name: str, patterns: Collection[str]) -> bool:
    """Whether a pattern names a tensor.

    A pattern that ends in "." stands for all names that begin with it; another one for itself.
    """
    return any(name == p or (p.endswith(".") and name.startswith(p)) for p in patterns)
