"""Mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899) and label smoothing, on arrays of the host.

Shape letters: N images per batch, C channels, H height, W width, K classes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from triptych.core.config.mixing import MixSpec
from triptych.core.contracts import Array, Batch
from triptych.core.random import check_order, stream

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Size = tuple[int, int]


class Boxes(NamedTuple):
    """Boxes of images, each an array of one shape: from ``top`` and ``left`` to before the others.

    Pixels, int64.
    """

    top: Ints
    bottom: Ints
    left: Ints
    right: Ints

    def share(self, size: Size) -> Floats:
        """The share of an image's area outside each box, float64.

        Args:
            size: (H, W) of the images.
        """
        area = (self.bottom - self.top) * (self.right - self.left)
        return 1.0 - area / float(size[0] * size[1])


# ------------------------------------------------------------------------------------------- draws


def draws(spec: MixSpec, seed: int, step: int, batch: int, size: Size) -> dict[str, Array]:
    """The random numbers of a step's mixing; none if nothing is mixed.

    Args:
        spec: ``method.mixing``.
        seed: of the run.
        step: from 0.
        batch: N; even, if partners are reversed.
        size: (H, W) of the images.

    Returns:
        By name:

        - ``mix_partner`` (N,) int64, the image mixed into each image,
        - ``mix_share`` (N,) float64, the share of the image that stays; 1: it is not mixed,
        - ``mix_box`` (N, 4) int64, top, bottom, left, right of the box that CutMix replaces; all
          -1 where the image is mixed by Mixup or not at all.
    """
    if not spec.mixes:
        return {}
    generator = stream(seed, "mixing", step)
    partner = np.arange(batch)[::-1].copy()
    if spec.partner == "permuted":
        partner = generator.permutation(batch)
    count = {"batch": 1, "pair": batch // 2, "elem": batch}[spec.mode]
    share, boxes = _shares(spec, generator, count, size)
    if spec.mode == "batch":
        share, boxes = np.repeat(share, batch), np.repeat(boxes, batch, axis=0)
    elif spec.mode == "pair":
        share, boxes = np.concatenate([share, share[::-1]]), np.concatenate([boxes, boxes[::-1]])
    return {"mix_partner": partner, "mix_share": share, "mix_box": boxes}


def _shares(spec: MixSpec, generator: Generator, count: int, size: Size) -> tuple[Floats, Ints]:
    """``count`` draws of shares (count,) and boxes (count, 4), as ``draws`` returns them."""
    mixed = generator.random(count) < spec.prob
    switched = generator.random(count) < spec.switch_prob
    cut = mixed & spec.cuts & (switched | (not spec.mixup))
    share = np.ones(count)
    if spec.mixup:
        share = np.where(mixed & ~cut, generator.beta(spec.mixup, spec.mixup, count), share)
    boxes = np.full((count, 4), -1)
    if spec.cuts:
        drawn = _boxes(spec, generator, count, size)
        share = np.where(cut, drawn.share(size), share)
        boxes = np.where(cut[:, None], np.stack(drawn, axis=1), boxes)
    return share, boxes


def _boxes(spec: MixSpec, generator: Generator, count: int, size: Size) -> Boxes:
    if spec.cutmix_sides is None:
        share = generator.beta(spec.cutmix, spec.cutmix, count)
        return boxes(size, share, generator.integers(size, size=(count, 2)), spec.box)
    low, high = ((np.array(size) * side).astype(np.int64) for side in spec.cutmix_sides)
    sides = generator.integers(low, np.maximum(high, low + 1), (count, 2))
    room = np.maximum(size - sides + (spec.box == "exact"), 1)
    corner = generator.integers(0, room)
    (top, left), (bottom, right) = corner.T, (corner + sides).T
    return Boxes(top, bottom, left, right)


def boxes(size: Size, share: Floats, center: Ints, rule: str) -> Boxes:
    """The boxes of CutMix around drawn centres, cut at the borders of the image.

    Args:
        size: (H, W) of the images.
        share: (n,) drawn shares of the area outside the boxes. The shares of the boxes differ by
            rounding and at the borders.
        center: (n, 2) row and column of the centres.
        rule: "even" or "exact", as ``box`` of the spec.
    """
    sides = (np.array(size) * np.sqrt(1 - share)[:, None]).astype(np.int64)
    far = sides // 2 if rule == "even" else (sides + 1) // 2
    top, left = np.clip(center - sides // 2, 0, size).T
    bottom, right = np.clip(center + far, 0, size).T
    return Boxes(top, bottom, left, right)


def check_draws(draws: Mapping[str, Array], size: Size) -> None:
    """Checks the values of draws that a file supplies; see ``draws``.

    Raises:
        ValueError: partners that are no permutation, shares outside 0 to 1, or boxes outside the
            image.
    """
    if not draws:
        return
    check_order("mix_partner", draws["mix_partner"])
    share, box = draws["mix_share"], draws["mix_box"]
    if not ((share >= 0) & (share <= 1)).all():
        raise ValueError("mix_share: expected values from 0 to 1")
    top, bottom, left, right = box.T
    within = (top >= 0) & (top <= bottom) & (bottom <= size[0])
    within &= (left >= 0) & (left <= right) & (right <= size[1])
    if not (within | (box == -1).all(axis=1)).all():
        raise ValueError(f"mix_box: expected boxes in images of {size[0]} x {size[1]}, or -1")


# ------------------------------------------------------------------------------------------ mixing


def mix(
    batch: Batch, draws: Mapping[str, Array], classes: int, smoothing: float
) -> tuple[Array, Array]:
    """The mixed images, and what a classifier shall say about them.

    Args:
        batch: one view (N, C, H, W), floats, which are not changed; labels; and the partners that
            are not among the images.
        draws: what ``draws`` returned for a batch of the step's or a larger size.
        classes: K.
        smoothing: s of the smoothed targets.

    Returns:
        images (N, C, H, W) in their type, and targets (N, K) float64, whose rows sum to 1.
    """
    images, labels = batch.views[0], cast(Ints, batch.labels)
    if not draws:
        return images, one_hot(labels, classes, smoothing)
    if batch.partners is not None:
        images = [*images, *batch.partners.images]
        labels = np.concatenate([labels, batch.partners.labels])
    draws = of_batch(first(draws, batch.whole_size), batch)
    targets = one_hot(labels, classes, smoothing)
    partner, share = draws["mix_partner"], draws["mix_share"][:, None]
    targets = targets[: len(partner)] * share + targets[partner] * (1.0 - share)
    return mixed(images, draws), targets


def missing(partner: Ints, rows: slice) -> Ints:
    """The partners of some rows of a batch that are not among these rows, ascending.

    Args:
        partner: (N,) "mix_partner" of ``draws``.
    """
    wanted: Ints = np.unique(partner[rows])
    outside: Ints = wanted[(wanted < rows.start) | (wanted >= rows.stop)]
    return outside


def of_batch(draws: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
    """The draws of the images of one copy of the model.

    Args:
        draws: of the step's batch; not empty.

    Returns:
        As ``draws``. A partner is the number of an image of the batch or, after all of these, of
        one of ``batch.partners``.
    """
    rows = np.arange(batch.whole_size)[batch.rows]
    others: Ints = np.empty(0, np.int64) if batch.partners is None else batch.partners.rows
    place = np.full(batch.whole_size, -1)
    place[np.concatenate([rows, others])] = np.arange(len(rows) + len(others))
    own = {name: array[batch.rows] for name, array in draws.items()}
    return {**own, "mix_partner": place[own["mix_partner"]]}


def first(draws: Mapping[str, Array], count: int) -> dict[str, Array]:
    """The draws of a smaller batch, as the last one of an epoch may be. Partners are permuted.

    Args:
        draws: what ``draws`` returned; not empty.
        count: number of images, at most N.
    """
    partner = draws["mix_partner"]
    rest = {name: draws[name][:count] for name in ("mix_share", "mix_box")}
    return {"mix_partner": partner[partner < count], **rest}


def one_hot(labels: Ints, classes: int, smoothing: float) -> Floats:
    """Smoothed targets, 1 - s + s / K for the label and s / K for every other class: (N, K)."""
    others = smoothing / classes
    targets = np.full((len(labels), classes), others)
    targets[np.arange(len(labels)), labels] = 1.0 - smoothing + others
    return targets


def mixed(images: Sequence[Array], draws: Mapping[str, Array]) -> Array:
    """Each image with its share of its partner, (N, C, H, W) in the type of ``images``.

    Args:
        images: each (C, H, W) floats. They are not changed. Those after the first N are partners
            only.
        draws: what ``draws`` returned for N images; not empty.
    """
    shape, kind = images[0].shape, images[0].dtype
    result, scratch = np.empty((len(draws["mix_share"]), *shape), kind), np.empty(shape, kind)
    shares = draws["mix_share"].astype(kind)
    rests = (1.0 - draws["mix_share"]).astype(kind)
    # Image by image: an image stays in the cache for its passes.
    for row, (other, box) in enumerate(zip(draws["mix_partner"], draws["mix_box"], strict=True)):
        top, bottom, left, right = box  # empty where it is -1
        if top >= 0 or shares[row] == 1:
            result[row] = images[row]
            result[row, :, top:bottom, left:right] = images[other][:, top:bottom, left:right]
        else:
            np.multiply(images[row], shares[row], out=result[row])
            result[row] += np.multiply(images[other], rests[row], out=scratch)
    return result
