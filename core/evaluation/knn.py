"""Weighted k-nearest-neighbour classification of frozen features.

Wu et al. 2018 (arXiv 1805.01978, section 3.4): each of the k nearest labelled images votes for its
class with exp(cosine similarity / temperature). float64, in blocks: memory does not grow with the
number of images, and the answer does not depend on the blocks.

Shape letters: B labelled images (the bank), Q queries, D feature width, K neighbours.
"""

import numpy as np
from pydantic import FiniteFloat, PositiveInt

from triptych.core.contracts import Array
from triptych.core.evaluation.row import Evaluation, Share
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.subject import Check, Subject, never
from triptych.core.random import stream

QUERIES, BANK = 256, 8192
"""Rows of one block of similarities: 16 MiB."""
DECIMALS = 12
"""Similarities are rounded to these: the last bits of a product depend on the shape of the block,
and must not decide between neighbours that are equally near."""


class KnnRow(Evaluation):
    """Accuracy with one number of labels.

    Attributes:
        branch, tokens: the features, as in ``Subject``.
        top1: share of the queries that got their own label.
        labels: how many labelled images per class vote, or "all".
        k: neighbours that vote.
        temperature: as in ``classify``.
        bank: labelled images.
        queries: images that were classified.
        split: digest of the evaluated images.
        skipped: damaged files that were left out.
        image_warnings: files that a library has warned of.
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


def rows(split: Split, subject: Subject) -> list[KnnRow]:
    """One row with all labels, and one for each smaller number of ``evaluate.per_class``.

    Raises:
        UserError, NonFiniteError: as ``Split.features``.
    """
    chosen = split.spec.evaluate
    features = split.features(subject)
    # A count of the largest class or more would repeat the row with all labels.
    largest = np.bincount(features.bank.labels).max()
    found = []
    for count in (None, *(count for count in chosen.per_class if count < largest)):
        bank, labels = features.bank.features, features.bank.labels
        if count:
            few = few_labels(labels, count)
            bank, labels = bank[few], labels[few]
        k = min(chosen.k, len(bank))
        top1 = accuracy(
            bank,
            labels,
            features.queries.features,
            features.queries.labels,
            k=k,
            temperature=chosen.temperature,
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
            temperature=chosen.temperature,
            bank=len(bank),
            queries=len(features.queries.labels),
            split=features.digest,
            skipped=features.skipped,
            image_warnings=features.image_warnings,
        )
        found.append(row)
    return found


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
    """Share of the queries that get their own label, 0..1; arguments as in ``classify``.

    Args:
        query_labels: (Q,) int64.
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
    """The class with the most votes; (Q,) int64.

    Equally near neighbours enter in the order of the bank; of classes with equally many votes the
    lower one wins.

    Args:
        bank: (B, D), any length of rows.
        labels: (B,) int64, >= 0.
        queries: (Q, D).
        k: neighbours that vote; at most B.
        temperature: dimensionless, > 0.
        check: is called between blocks of queries, see ``Subject``.

    Raises:
        ValueError: k beyond the bank, or features that are not finite.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k: expected 1 to {len(bank)} (the bank), got {k}")
    predicted = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), QUERIES):
        check()
        similarity, index = _nearest(bank, _unit(queries[start : start + QUERIES]), k)
        # Relative to the nearest, so that a small temperature cannot overflow; no order changes.
        weights = np.exp((similarity - similarity[:, :1]) / temperature)
        votes = np.zeros((len(weights), int(labels.max()) + 1))
        np.add.at(votes, (np.arange(len(weights))[:, None], labels[index]), weights)
        predicted[start : start + QUERIES] = votes.argmax(axis=1)
    return predicted


def few_labels(labels: Array, per_class: int) -> Array:
    """Indices of ``per_class`` images of each class (all where it has fewer), the same always.

    Args:
        labels: (B,) int64.

    Returns:
        Ascending, int64.
    """
    order = stream(0, "few-labels", per_class).permutation(len(labels))
    chosen = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def _unit(rows: Array) -> Array:
    rows = rows.astype(np.float64)
    if not np.isfinite(rows).all():
        raise ValueError("features are not finite")
    unit: Array = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def _nearest(bank: Array, queries: Array, k: int) -> tuple[Array, Array]:
    """Similarities and bank indices of the k nearest, nearest first, each (Q, K).

    Args:
        queries: (Q, D), unit rows.
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
    """Columns of the k largest of each row, descending; of equal values the left one first."""
    if values.shape[1] > k:
        kth = -np.partition(-values, k - 1, axis=1)[:, k - 1 : k]
        above, equal = values > kth, values == kth
        room = k - above.sum(axis=1, keepdims=True)
        kept = above | (equal & (np.cumsum(equal, axis=1) <= room))
        columns = np.nonzero(kept)[1].reshape(len(values), k)
    else:
        columns = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    order = np.argsort(-np.take_along_axis(values, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)
