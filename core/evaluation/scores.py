"""Top-1, top-5 and loss of classifiers, from logits that come batch by batch.

Shape letters:
    H: classifiers.
    N: images.
    C: classes.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from triptych.core.contracts import Array

TOP = (1, 5)


@dataclass(frozen=True)
class Scores:
    """The results of all classifiers on the same images.

    Attributes:
        top1: (H,) float64, share of the images whose label has the largest logit.
        top5: (H,) float64, share of the images whose label is among the five largest logits.
        loss: (H,) float64, mean cross-entropy in nats.
        predicted: (H, N) int32, the class with the largest logit; of equal ones the first.
        labels: (N,) int64.
    """

    top1: Array
    top5: Array
    loss: Array
    predicted: Array
    labels: Array

    @cached_property
    def best(self) -> int:
        """The classifier with the largest top-1; of equal ones the last."""
        return len(self.top1) - 1 - int(self.top1[::-1].argmax())

    def confusion(self, head: int, classes: int) -> Array:
        """The matrix ``confusion`` of one classifier.

        Args:
            head: position of the classifier.
            classes: number of classes.
        """
        return confusion(self.labels, self.predicted[head], classes)


def confusion(labels: Array, predicted: Array, classes: int) -> Array:
    """How often each label met each prediction.

    Args:
        labels: (N,) int64.
        predicted: (N,) integers.
        classes: number of classes.

    Returns:
        (C, C) int64, a row for each label.
    """
    counts: Array = np.bincount(labels * classes + predicted, minlength=classes**2)
    return counts.astype(np.int64).reshape(classes, classes)


class Tally:
    """Adds up the results of classifiers batch by batch. It keeps no logits."""

    def __init__(self) -> None:
        self._sums: list[Array] = []
        self._predicted: list[Array] = []
        self._labels: list[Array] = []

    def add(self, logits: Array, labels: Array) -> None:
        """Adds one batch.

        Args:
            logits: (H, N, C), finite.
            labels: (N,) int64, 0 to C - 1.
        """
        self.take(*counted(logits, labels), labels)

    def take(self, sums: Array, predicted: Array, labels: Array) -> None:
        """Adds what ``counted`` gave for one batch with these labels."""
        self._sums.append(sums)
        self._predicted.append(predicted)
        self._labels.append(labels)

    def scores(self) -> Scores:
        """The results of all batches so far, of which there is at least one."""
        labels = np.concatenate(self._labels)
        top1, top5, loss = (np.sum(self._sums, axis=0) / len(labels)).T
        return Scores(top1, top5, loss, np.concatenate(self._predicted, axis=1), labels)


def counted(logits: Array, labels: Array) -> tuple[Array, Array]:
    """What a tally keeps of one batch.

    Args:
        logits: (H, N, C), finite.
        labels: (N,) int64, 0 to C - 1.

    Returns:
        (H, 3) float64, hits for each of ``TOP`` and sum of the losses; and (H, N) int32, the class
        with the largest logit.
    """
    sums = np.stack([_sums(head, labels) for head in logits])
    return sums, logits.argmax(axis=2).astype(np.int32)


def _sums(logits: Array, labels: Array) -> Array:
    """The number of hits for each of ``TOP``, and the sum of the losses, of one classifier.

    A label whose logit equals others comes after them: equal logits predict nothing.
    """
    logits = logits.astype(np.float64)
    own = logits[np.arange(len(labels)), labels][:, None]
    rank = (logits >= own).sum(axis=1) - 1
    shift = logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits - shift).sum(axis=1, keepdims=True)) + shift - own
    return np.array([*((rank < k).sum() for k in TOP), losses.sum()])
