"""Draws the images of each class that have a label in a run or an evaluation."""

from collections.abc import Sequence

import numpy as np

from triptych.core.contracts import Array
from triptych.core.data.classes import quoted
from triptych.core.errors import UserError, printable
from triptych.core.random import stream


def draw(
    amount: int | str, seed: int, labels: Array, classes: Sequence[str], *, key: str, of: str
) -> Array:
    """Images of each class, drawn with a seed.

    One random order of the images belongs to each seed. The first images of each class in that
    order are taken, so a larger number contains the smaller ones. A share of a class is rounded to
    the nearest number of images, at least one.

    Args:
        amount: number of images per class, or their share of each class, e.g. "1%".
        labels: (N,) int64, positions in ``classes``; -1 for no label.
        key: name of the spec's key that gives the amount, for messages.
        of: what the images are, for messages.

    Returns:
        (n,) int64, ascending positions of the images.

    Raises:
        UserError: a class has fewer images, or none.
    """
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    require_all(counts, classes, of)
    if isinstance(amount, str):
        wanted = np.maximum(np.floor(counts * float(amount[:-1]) / 100 + 0.5), 1).astype(np.int64)
    else:
        wanted = np.full(len(counts), amount)
    if (short := np.flatnonzero(counts < wanted)).size:
        name, count = printable(classes[short[0]]), counts[short[0]]
        raise UserError(f"{key}: {amount}: class '{name}' has only {count} images; lower it")
    order = stream(seed, "lowshot").permutation(len(labels))
    # A stable sort by class keeps the random order inside each class.
    ordered = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[ordered], np.arange(len(counts)))
    picked = [ordered[start : start + n] for start, n in zip(starts, wanted, strict=True)]
    return np.sort(np.concatenate(picked))


def require_all(counts: Array, classes: Sequence[str], where: str) -> None:
    """Raises UserError if a class has no image.

    Args:
        counts: number of images of each class.
        where: what the images are, for the message.
    """
    empty = [classes[label] for label in np.flatnonzero(counts == 0)]
    if empty:
        raise UserError(
            f"{where}: no labelled image of {len(empty)} of the {len(counts)} classes: "
            f"{quoted(empty)}"
        )
