"""Weighted k-nearest-neighbour classification of frozen features.

Wu et al. 2018 (arXiv 1805.01978, section 3.4): each of the k nearest labelled images votes for its
class with exp(cosine similarity / temperature). The votes are computed in float64 and in blocks:
memory does not grow with the number of images, and the result does not depend on the block size.

Shape letters:
    B: labelled images (the bank).
    Q: queries.
    D: feature width.
    K: neighbours.
"""

import numpy as np
from pydantic import FiniteFloat, PositiveInt

from triptych.core.contracts import Array
from triptych.core.evaluation.row import Evaluation, Share
from triptych.core.evaluation.split import Halves
from triptych.core.evaluation.subject import Check, Subject, never
from triptych.core.random import stream

QUERIES, BANK = 256, 8192
"""Rows and columns of one block of similarities, which takes 16 MiB."""
DECIMALS = 12
"""Decimal places that similarities are rounded to.

The last bits of a product depend on the shape of the block. They must not decide between equally
near neighbours.
"""


class KnnRow(Evaluation):
    """Accuracy with one number of labels.

    Attributes:
        branch: as in ``Subject``.
        tokens: as in ``Subject``.
        labels: number of labelled images per class that vote, or "all".
        top1: share of the queries whose predicted class is their label, 0 to 1.
        k: number of neighbours that vote.
        temperature: as in ``classify``.
        bank: number of labelled images.
        queries: number of classified images.
        split: digest of the evaluated images.
        skipped: number of damaged files that were left out.
        image_warnings: number of files that an image library has warned about.
    """

    branch: str = ""
    tokens: str = ""
    labels: int | str
    top1: Share
    k: PositiveInt
    temperature: FiniteFloat
    bank: int = 0
    queries: int = 0
    split: str = ""
    skipped: int = 0
    image_warnings: int = 0

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
        if self.skipped:
            parts.append(f"damaged files left out: {self.skipped}")
        return f"{super().line()} ({', '.join(parts)})"


def rows(split: Halves, subject: Subject) -> list[KnnRow]:
    """One row with all labels, and one for each smaller count in ``evaluate.per_class``.

    Raises:
        UserError, NonFiniteError: as in ``Halves.features``.
    """
    settings = split.spec.evaluate
    features = split.features(subject)
    # A count that is not below the largest class would repeat the row with all labels.
    largest = np.bincount(features.bank.labels).max()
    results = []
    for count in (None, *(count for count in settings.per_class if count < largest)):
        bank, labels = features.bank.features, features.bank.labels
        if count:
            few = few_labels(labels, count)
            bank, labels = bank[few], labels[few]
        k = min(settings.k, len(bank))
        top1 = accuracy(
            bank,
            labels,
            features.queries.features,
            features.queries.labels,
            k=k,
            temperature=settings.temperature,
            check=subject.check,
        )
        row = KnnRow(
            eval="knn",
            step=subject.step,
            branch=subject.branch,
            tokens=subject.tokens,
            labels=count or "all",
            top1=top1,
            k=k,
            temperature=settings.temperature,
            bank=len(bank),
            queries=len(features.queries.labels),
            split=features.digest,
            skipped=features.skipped,
            image_warnings=features.image_warnings,
        )
        results.append(row)
    return results


def accuracy(
    bank: Array,
    bank_labels: Array,
    queries: Array,
    query_labels: Array,
    *,
    k: int,
    temperature: float,
    check: Check = never,
) -> float:
    """Share of the queries whose predicted class is their label, 0 to 1.

    Args:
        query_labels: (Q,) int64. The other arguments are those of ``classify``.
    """
    predicted = classify(bank, bank_labels, queries, k=k, temperature=temperature, check=check)
    return float(np.mean(predicted == query_labels))


def classify(
    bank: Array,
    labels: Array,
    queries: Array,
    *,
    k: int,
    temperature: float,
    check: Check = never,
) -> Array:
    """The class with the most votes, for each query.

    Among equally near neighbours the first ones of the bank vote. Among classes with equally many
    votes the lowest one wins.

    Args:
        bank: (B, D); the rows may have any length.
        labels: (B,) int64, >= 0.
        queries: (Q, D).
        k: number of neighbours that vote, 1 to B.
        temperature: dimensionless, > 0.
        check: called before each block of queries, see ``Subject``.

    Returns:
        (Q,) int64.

    Raises:
        ValueError: k is not in 1 to B, or features are not finite.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k: expected 1 to {len(bank)} (the bank), got {k}")
    predicted = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), QUERIES):
        check()
        similarity, index = _nearest(bank, _unit(queries[start : start + QUERIES]), k)
        # Relative to the nearest: exp cannot overflow, and the order of the votes stays.
        weights = np.exp((similarity - similarity[:, :1]) / temperature)
        votes = np.zeros((len(weights), int(labels.max()) + 1))
        np.add.at(votes, (np.arange(len(weights))[:, None], labels[index]), weights)
        predicted[start : start + QUERIES] = votes.argmax(axis=1)
    return predicted


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


def _unit(rows: Array) -> Array:
    rows = rows.astype(np.float64)
    if not np.isfinite(rows).all():
        raise ValueError("features are not finite")
    unit: Array = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def _nearest(bank: Array, queries: Array, k: int) -> tuple[Array, Array]:
    """Similarities and bank indices of the k nearest neighbours, the nearest first.

    Args:
        queries: (Q, D), rows of unit length.

    Returns:
        Similarities (Q, K) float64 and indices (Q, K) int64.
    """
    best = np.empty((len(queries), 0))
    index = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(bank), BANK):
        block = _unit(bank[start : start + BANK])
        similarity = np.hstack([best, np.round(queries @ block.T, DECIMALS)])
        position = np.arange(start, start + len(block))
        index = np.hstack([index, np.broadcast_to(position, (len(queries), len(block)))])
        column = _largest(similarity, k)
        best = np.take_along_axis(similarity, column, axis=1)
        index = np.take_along_axis(index, column, axis=1)
    return best, index


def _largest(values: Array, k: int) -> Array:
    """Columns of the k largest values in each row, descending; equal values from left to right."""
    if values.shape[1] > k:
        kth = -np.partition(-values, k - 1, axis=1)[:, k - 1 : k]
        above, equal = values > kth, values == kth
        room = k - above.sum(axis=1, keepdims=True)
        largest = above | (equal & (np.cumsum(equal, axis=1) <= room))
        columns = np.nonzero(largest)[1].reshape(len(values), k)
    else:
        columns = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    order = np.argsort(-np.take_along_axis(values, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)
