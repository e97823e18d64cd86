"""The ``method.mixing`` section: images mixed with each other, and the targets of the mixture."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from triptych.core.config.fields import (
    Float,
    FractionInterval,
    KeyedError,
    NonNegativeFloat,
    Probability,
    Section,
)


class MixSpec(Section):
    """Mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899) and smoothed targets.

    The published values, where all other keys have their defaults:

    - timm, DeiT, MOCA, MAE: mixup 0.8, cutmix 1.0, smoothing 0.1.
    - mmpretrain: mixup 0.8, cutmix 1.0, smoothing 0.1, partner permuted.
    """

    mixup: NonNegativeFloat = 0.0
    """Mixup adds a share of another image. The image's own share is drawn from Beta(mixup, mixup).
    0: no Mixup."""
    cutmix: NonNegativeFloat = 0.0
    """CutMix replaces a box by that of another image. The image's own share of the area is drawn
    from Beta(cutmix, cutmix). 0: no CutMix."""
    cutmix_sides: FractionInterval | None = None
    """Range of a CutMix box's sides, as fractions of the image's. If given, they are drawn
    uniformly instead of the area."""
    prob: Probability = 1.0
    """Probability that images are mixed."""
    switch_prob: Probability = 0.5
    """Probability of CutMix where both are on; else Mixup."""
    mode: Literal["batch", "pair", "elem"] = "batch"
    """What has draws of its own. batch: the whole batch. pair: each two images that are mixed with
    each other. elem: each image."""
    partner: Literal["reversed", "permuted"] = "reversed"
    """The image that is mixed in. reversed: that of the batch in reversed order (timm). permuted:
    that of a random order, which may be the image itself (mmpretrain)."""
    box: Literal["even", "exact"] = "even"
    """Sides of CutMix boxes. even: odd sides lose a pixel (timm up to 1.0.27, and the programs of
    MAE, DeiT, MOCA and mmpretrain). exact: they keep it (timm 1.0.31)."""
    smoothing: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing s: the target is 1 - s + s / classes for the label and s / classes for every
    other class. This is timm's smoothing, and mmpretrain's of mode original."""

    @property
    def mixes(self) -> bool:
        """Whether any images are mixed."""
        return self.prob > 0 and bool(self.mixup or self.cuts)

    @property
    def cuts(self) -> bool:
        """Whether CutMix is on."""
        return self.cutmix > 0 or self.cutmix_sides is not None

    def contradictions(self) -> Iterator[KeyedError]:
        """Reports pairs that are none."""
        if self.mode == "pair" and self.partner == "permuted":
            yield KeyedError(
                "mode", "pair: partners of a random order make no pairs; set partner: reversed"
            )


def mixing_contradictions(mixing: MixSpec, batch_size: int) -> Iterator[KeyedError]:
    """The contradictions between mixing and the batch, each at the key that should change."""
    if mixing.mixes and mixing.partner == "reversed" and batch_size % 2:
        yield KeyedError(
            "train.batch_size",
            f"{batch_size} is odd: method.mixing pairs the images of a batch; give an even "
            "number, or set method.mixing.partner: permuted",
        )
