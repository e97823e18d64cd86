"""Mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899) and label smoothing, on arrays of the host.

Shape letters: N images per batch, C channels, H height, W width, K classes.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from triptych.core.config.mixing import MixSpec
from triptych.core.contracts import Array
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
    images: Array, labels: Ints, draws: Mapping[str, Array], classes: int, smoothing: float
) -> tuple[Array, Array]:
    """The mixed images, and what a classifier shall say about them.

    Args:
        images: (N, C, H, W) floats. They are not changed.
        labels: (N,) int64.
        draws: what ``draws`` returned for a batch of this or a larger size.
        classes: K.
        smoothing: s of the smoothed targets.

    Returns:
        images (N, C, H, W) in their type, and targets (N, K) float64, whose rows sum to 1.
    """
    targets = one_hot(labels, classes, smoothing)
    if not draws:
        return images, targets
    draws = first(draws, len(images))
    partner, share = draws["mix_partner"], draws["mix_share"][:, None]
    targets = targets * share + targets[partner] * (1.0 - share)
    return mixed(images, draws), targets


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


def mixed(images: Array, draws: Mapping[str, Array]) -> Array:
    """Each image with its share of its partner, (N, C, H, W) in the type of ``images``.

    Args:
        images: (N, C, H, W) floats. They are not changed.
        draws: what ``draws`` returned; not empty.
    """
    result, scratch = np.empty_like(images), np.empty_like(images[0])
    shares = draws["mix_share"].astype(images.dtype)
    rests = (1.0 - draws["mix_share"]).astype(images.dtype)
    # Image by image: an image stays in the cache for its passes.
    for row, (other, box) in enumerate(zip(draws["mix_partner"], draws["mix_box"], strict=True)):
        top, bottom, left, right = box  # empty where it is -1
        if top >= 0 or shares[row] == 1:
            result[row] = images[row]
            result[row, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
        else:
            np.multiply(images[row], shares[row], out=result[row])
            result[row] += np.multiply(images[other], rests[row], out=scratch)
    return result
