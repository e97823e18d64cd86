"""Effective rank of features, which needs no labels: RankMe and LiDAR.

Both are the exponential of the entropy of a normalised spectrum: 1 if all features lie on a line,
D if they fill all D dimensions evenly.

Shape letters:
    N: images.
    V: views of each image.
    D: feature width.
"""

from typing import Literal

import numpy as np
from pydantic import FiniteFloat

from triptych.core.contracts import Array
from triptych.core.data import augmented_views
from triptych.core.errors import NonFiniteError
from triptych.core.evaluation.row import Evaluation
from triptych.core.evaluation.split import Halves, Split
from triptych.core.evaluation.subject import Subject
from triptych.core.random import stream

EPSILON = 1e-7
"""Added to each share of the spectrum, as in RankMe's equation 1."""
DELTA = 1e-4
"""Added to the diagonal of LiDAR's scatter within images."""
NAMES = {"rankme": "RankMe", "lidar": "LiDAR"}


class RankRow(Evaluation):
    """Effective rank by one of the two measures.

    Attributes:
        measure: "rankme" or "lidar".
        rank: as in ``rankme`` or ``lidar``, 1 to ``width``.
        width: D.
        branch: as in ``Subject``.
        tokens: as in ``Subject``.
        images: N.
        views: V; 1 for RankMe.
        epsilon: added to each share of the spectrum.
        delta: of LiDAR, see ``DELTA``.
    """

    measure: Literal["rankme", "lidar"]
    rank: FiniteFloat
    width: int = 0
    branch: str = ""
    tokens: str = ""
    images: int = 0
    views: int = 1
    epsilon: FiniteFloat = EPSILON
    delta: FiniteFloat | None = None

    @property
    def title(self) -> str:
        """See ``Evaluation``."""
        return "effective rank"

    @property
    def variant(self) -> str:
        """See ``Evaluation``."""
        return NAMES[self.measure]

    @property
    def main(self) -> bool:
        """RankMe's row."""
        return self.measure == "rankme"

    @property
    def measured(self) -> float:
        """See ``Evaluation``."""
        return self.rank

    @property
    def metric(self) -> str:
        """See ``Evaluation``."""
        return "effective rank"

    @property
    def sign(self) -> str:
        """See ``Evaluation``."""
        return ""

    @property
    def measured_on(self) -> str:
        """See ``Evaluation``."""
        return "training images"

    @property
    def tag(self) -> str:
        """See ``Evaluation``."""
        return f"{self.eval}/{self.measure}"

    def line(self) -> str:
        """See ``Evaluation``."""
        images = f"{self.images} images"
        if self.views > 1:
            images += f" in {self.views} views"
        return (
            f"step {self.step} {self.title} {self.rank:.2f} of {self.width} ({self.variant}, "
            f"{self.branch} {self.tokens}, {images})"
        )


def check(halves: Halves) -> None:
    """Raises nothing: the effective rank needs no labels."""


def rows(halves: Halves, subject: Subject) -> list[RankRow]:
    """RankMe's row, and LiDAR's if there are images to draw views of.

    Raises:
        UserError, NonFiniteError: as in ``Halves.features``.
    """
    settings = halves.spec.evaluate.rank
    features = halves.features(subject).bank.features
    order = stream(0, "rankme").permutation(len(features))[: settings.images]
    chosen = features[np.sort(order)]
    common = {"step": subject.step, "branch": subject.branch, "tokens": subject.tokens}
    subject.check()
    found = [
        RankRow.model_validate(
            {
                **common,
                "eval": "rank",
                "measure": "rankme",
                "rank": rankme(chosen),
                "width": chosen.shape[1],
                "images": len(chosen),
            }
        )
    ]
    if isinstance(halves, Split) and settings.view_images:
        views = _views(halves, subject)
        found.append(
            RankRow.model_validate(
                {
                    **common,
                    "eval": "rank",
                    "measure": "lidar",
                    "rank": lidar(views),
                    "width": views.shape[2],
                    "images": views.shape[0],
                    "views": views.shape[1],
                    "delta": DELTA,
                }
            )
        )
    return found


def _views(split: Split, subject: Subject) -> Array:
    """Features of augmented views of some images of the bank, (N, V, D)."""
    settings = split.spec.evaluate.rank
    order = stream(0, "lidar").permutation(len(split.bank))[: settings.view_images]
    features = []
    for views in augmented_views(split.spec, split.bank, np.sort(order), settings.views, "lidar"):
        subject.check()
        features.append(subject.embed(views))
    stacked = np.stack(features)
    if not np.isfinite(stacked).all():
        raise NonFiniteError(f"evaluation after step {subject.step}: features not finite")
    return stacked


def rankme(features: Array) -> float:
    """RankMe (Garrido et al., arXiv 2210.02885, equation 1), from the singular values.

    Args:
        features: (N, D).
    """
    return effective_rank(np.linalg.svd(features.astype(np.float64), compute_uv=False))


def lidar(features: Array) -> float:
    """LiDAR (Thilak et al., arXiv 2312.04000, section 3.2), from a linear discriminant analysis.

    Each image is a class, and its views are the class's members.

    Args:
        features: (N, V, D), two images and two views or more.
    """
    features = features.astype(np.float64)
    images, views, width = features.shape
    means = features.mean(axis=1)
    within = (features - means[:, None]).reshape(-1, width)
    between = means - means.mean(axis=0)
    values, vectors = np.linalg.eigh(within.T @ within / (images * views) + DELTA * np.eye(width))
    white = between @ (vectors / np.sqrt(values)) @ vectors.T
    return effective_rank(np.maximum(np.linalg.eigvalsh(white.T @ white / images), 0.0))


def effective_rank(spectrum: Array) -> float:
    """exp of the entropy of p = spectrum / its sum + ``EPSILON``; 1 for a spectrum of zeros.

    Args:
        spectrum: (D,), >= 0.
    """
    total = spectrum.sum()
    if not total:
        return 1.0
    share = spectrum / total + EPSILON
    return float(np.exp(-(share * np.log(share)).sum()))
