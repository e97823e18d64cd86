"""Weighted k-nearest-neighbour classification of frozen features.

Wu et al. 2018 (arXiv 1805.01978, section 3.4): each of the k nearest labelled images votes for its
class with exp(cosine similarity / temperature). Several k and temperatures share one search.

Shape letters:
    B: labelled images (the bank).
    Q: queries.
    C: classes.
    K: neighbours.
"""

from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
from pydantic import Field, FiniteFloat, PositiveInt

from triptych.core.config.evaluate import EvaluateSpec
from triptych.core.contracts import Array
from triptych.core.errors import UserError
from triptych.core.evaluation.neighbours import QUERIES, neighbours
from triptych.core.evaluation.row import Share, SplitRow
from triptych.core.evaluation.split import Halves, Labelled, require_classes
from triptych.core.evaluation.subject import Subject
from triptych.core.random import stream

TOP = 5
"""Classes among which the label has to be for ``top5``; k of them, if k is smaller."""


class KnnRow(SplitRow):
    """Accuracy with one number of labels.

    Attributes:
        tokens: as in ``Subject``.
        labels: number of labelled images per class that vote, or "all".
        top1: share of the queries whose predicted class is their label, 0 to 1.
        top5: share of the queries whose label is among the ``TOP`` first classes.
        k: number of neighbours that vote.
        temperature: as in ``votes``.
        grid: k, temperature, top1 and top5 of each setting, where the spec names several. The row's
            own are those of the first one.
        bank: number of labelled images.
        queries: number of classified images.
    """

    tokens: str = ""
    labels: int | str
    top1: Share
    top5: Share | None = None
    k: PositiveInt
    temperature: FiniteFloat
    grid: list[dict[str, int | float]] = Field(default_factory=list)
    bank: int = 0
    queries: int = 0

    @property
    def title(self) -> str:
        """See ``Evaluation``."""
        return "k-NN"

    @property
    def main(self) -> bool:
        """The row with all labels."""
        return self.labels == "all"

    @property
    def variant(self) -> str:
        """See ``Evaluation``."""
        return "all labels" if self.main else f"{self.labels} per class"

    @property
    def tag(self) -> str:
        """See ``Evaluation``."""
        return f"{self.eval}/{self.labels}"

    def line(self) -> str:
        """See ``Evaluation``."""
        parts = [
            "all labels" if self.main else f"{self.labels} labels per class",
            f"k {self.k}",
            f"T {self.temperature:g}",
            f"{self.branch} {self.tokens}",
            f"{self.bank} labelled",
            f"{self.queries} queries",
        ]
        return f"{super().line()} {self.noted(parts)}"

    def details(self) -> list[str]:
        """See ``Evaluation``."""
        return [
            f"k {setting['k']}, T {setting['temperature']:g}: top-1 {100 * setting['top1']:.2f} %, "
            f"top-5 {100 * setting['top5']:.2f} %"
            for setting in self.grid
        ]


def check(split: Halves) -> None:
    """Raises UserError for the reasons of ``require_classes``, and for k beyond the bank."""
    require_classes(split, "k-NN")
    _check_bank(split, len(split.labels()[0]))


def _check_bank(split: Halves, images: int) -> None:
    k = max(split.spec.evaluate.every_k)
    if k > images:
        raise UserError(
            f"evaluate.k: {k}: more than the {images} labelled images of the training split; "
            "lower it"
        )


def rows(split: Halves, subject: Subject) -> list[KnnRow]:
    """One row with all labels, and one for each smaller count in ``evaluate.per_class``.

    Where fewer images than k are labelled per class, all of them vote.

    Raises:
        UserError, NonFiniteError: as in ``Halves.features`` and ``check``.
    """
    settings = split.spec.evaluate
    features = split.features(subject)
    _check_bank(split, len(features.bank.labels))
    # A count that is not below the largest class would repeat the row with all labels.
    largest = np.bincount(features.bank.labels).max()
    results = []
    for count in (None, *(count for count in settings.per_class if count < largest)):
        bank, labels = features.bank.features, features.bank.labels
        if count:
            few = few_labels(labels, count)
            bank, labels = bank[few], labels[few]
        grid = _grid(settings, bank, labels, features.queries, subject)
        row = KnnRow(
            eval="knn",
            step=subject.step,
            branch=subject.branch,
            tokens=subject.tokens,
            labels=count or "all",
            **asdict(grid[0]),
            grid=[asdict(setting) for setting in grid] if len(grid) > 1 else [],
            bank=len(bank),
            queries=len(features.queries.labels),
            split=features.digest,
            skipped=features.skipped,
            image_warnings=features.image_warnings,
        )
        results.append(row)
    return results


@dataclass(frozen=True)
class _Setting:
    k: int
    temperature: float
    top1: float
    top5: float


def _grid(
    settings: EvaluateSpec, bank: Array, labels: Array, queries: Labelled, subject: Subject
) -> list[_Setting]:
    """The accuracy of each k with each temperature, by one search."""
    every_k = dict.fromkeys(min(k, len(bank)) for k in settings.every_k)
    similarity, index = subject.sharing.by_rows(
        queries.features,
        lambda rows: neighbours(bank, rows, max(every_k), subject.check, subject.product),
    )
    classes = labels[index]
    return [
        _Setting(k, t, *accuracy(similarity[:, :k], classes[:, :k], queries.labels, t))
        for k, t in product(every_k, settings.temperatures)
    ]


def accuracy(
    similarity: Array, classes: Array, labels: Array, temperature: float
) -> tuple[float, float]:
    """Shares of the queries whose label is the first class, and is among the ``TOP`` first.

    With k below ``TOP`` the label has to be among the k first, as in MOCA and DINO.
    Among classes with equally many votes the lowest one comes first. Classes without a vote come
    last, in their order.

    Args:
        similarity: (Q, K), the nearest first.
        classes: (Q, K) int64, of the neighbours.
        labels: (Q,) int64, of the queries.
        temperature: as in ``votes``.
    """
    count = int(max(classes.max(), labels.max())) + 1
    rank = np.empty(len(labels), np.int64)
    for start in range(0, len(labels), QUERIES):
        block = slice(start, start + QUERIES)
        scores = votes(similarity[block], classes[block], temperature, count)
        rank[block] = ranks(scores, labels[block])
    return float(np.mean(rank < 1)), float(np.mean(rank < min(TOP, classes.shape[1])))


def ranks(scores: Array, labels: Array) -> Array:
    """Number of classes that come before each label, (Q,) int64; of equal scores the lower ones.

    Args:
        scores: (Q, C).
        labels: (Q,) int64, 0 to C - 1.
    """
    label = labels[:, None]
    own = np.take_along_axis(scores, label, axis=1)
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < label))
    count: Array = before.sum(axis=1)
    return count


def votes(similarity: Array, classes: Array, temperature: float, count: int) -> Array:
    """The votes for each class, relative to the vote of the nearest neighbour.

    Args:
        similarity: (Q, K), the nearest first.
        classes: (Q, K) int64, of the neighbours.
        temperature: dimensionless, > 0.
        count: C.

    Returns:
        (Q, C) float64.
    """
    # Relative to the nearest: exp cannot overflow, and the order of the votes stays.
    weights = np.exp((similarity - similarity[:, :1]) / temperature)
    place = np.arange(len(classes))[:, None] * count + classes
    total = np.bincount(place.ravel(), weights.ravel(), len(classes) * count)
    return total.reshape(len(classes), count)


def few_labels(labels: Array, per_class: int) -> Array:
    """Picks ``per_class`` images of each class, or all of a smaller class.

    The same labels always give the same choice.

    Args:
        labels: (B,) int64.

    Returns:
        Indices into ``labels``, ascending, int64.
    """
    order = stream(0, "few-labels", per_class).permutation(len(labels))
    picked = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(picked))
