"""The ``evaluate.lowshot`` section: classification with few labelled images."""

import re
from collections.abc import Iterator
from typing import Literal

from triptych.core.config.fields import (
    Bool,
    KeyedError,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Str,
)


def is_amount(value: int | str) -> bool:
    """Whether ``value`` is a number of images per class, or a share of each class like "1%"."""
    if isinstance(value, int):
        return True
    return bool(re.fullmatch(r"\d+(\.\d+)?%", value)) and 0 < float(value[:-1]) <= 100


class LowshotSpec(Section):
    """Logistic regression on few labelled images (tools/eval.py lowshot)."""

    shots: tuple[PositiveInt | Str, ...] = (1, 2, 5, "1%")
    """Numbers of labelled images per class, or shares of each class like 1%. Each has its own
    result. Not used with files."""
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """Each seed draws its own images. The result is the mean over the seeds. A larger number of
    images contains the smaller ones of the same seed. Not used with files."""
    files: tuple[Str, ...] = ()
    """Text files that name the labelled images instead: one file name in each line, as in the
    lists of MSN. Files with the same number of images per class give one result, their mean."""
    lambdas: tuple[PositiveFloat, ...] = (0.1,)
    """The classifier W minimises sum_i CE_i + lambda/2 |W|^2. Each lambda has its own result."""
    center: Bool = True
    """Whether the mean over its own dimensions is subtracted from each feature."""
    normalize: Bool = True
    """Whether each feature is scaled to unit length, after centering."""
    tokens: Literal["cls", "mean"] | None = None
    """As evaluate.tokens, and the same if it is null."""
    final_norm: Bool = True
    """Whether the feature is the output after the encoder's last norm. Otherwise it is the output
    of the last blocks before that norm."""
    blocks: PositiveInt = 1
    """Number of last blocks (in a ResNet: stages) whose features are concatenated."""

    interpolation: Literal["bilinear", "bicubic"] | None = None
    """As augment.eval_interpolation, and the same if it is null."""

    def contradictions(self) -> Iterator[KeyedError]:
        """See ``Section``."""
        for key, values in (
            ("shots", self.shots),
            ("seeds", self.seeds),
            ("lambdas", self.lambdas),
        ):
            if not values:
                yield KeyedError(key, "[]: expected at least one")
        for share in self.shots:
            if not is_amount(share):
                yield KeyedError("shots", f"{share!a}: expected a number, or a share like 1%")
        if self.final_norm and self.blocks > 1:
            yield KeyedError(
                "final_norm",
                "true: only the last block has that norm; set it to false, or blocks to 1",
            )
