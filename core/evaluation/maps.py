"""Maps of features: in the plane, and as colours of an image's patches.

Shape letters: N images, L positions of patches or of a feature map, D feature width.
"""

import numpy as np

from triptych.core.config.spec import ModelSpec, VitSpec
from triptych.core.contracts import Array
from triptych.core.evaluation.neighbours import unit_rows

FEWEST = 5
"""Images that a map in the plane needs."""
NEIGHBOURS = 30.0
"""Perplexity of t-SNE, the number of neighbours that a point minds; a third of N if N is small."""
WIDTH = 50
"""Principal components that t-SNE gets."""


def plane(features: Array) -> tuple[Array, float] | None:
    """The two main directions of the features at unit length.

    Returns:
        Coordinates (N, 2) float64, and the share of the variance that they hold; None if there are
        fewer than ``FEWEST`` images, or all features are equal.
    """
    rows = unit_rows(features)
    if len(rows) < FEWEST or constant(rows):
        return None
    points = principal(rows, 2)
    total = np.var(rows, axis=0).sum()
    return points, float(np.var(points, axis=0).sum() / total)


def neighbourhoods(features: Array) -> Array:
    """t-SNE of the features at unit length (van der Maaten and Hinton 2008), seed 0.

    Args:
        features: (N, D), for which ``plane`` gives a map.

    Returns:
        (N, 2) float32.
    """
    from sklearn.manifold import TSNE  # slow to import, and seldom used

    rows = unit_rows(features)
    perplexity = min(NEIGHBOURS, (len(rows) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0)
    points: Array = tsne.fit_transform(principal(rows, WIDTH))
    return points


def patch_colours(tokens: Array) -> Array:
    """The three main directions of patch tokens as red, green and blue.

    The directions are those of all images together, so equal colours mean equal tokens everywhere.

    Args:
        tokens: (N, L, D).

    Returns:
        (N, L, 3) uint8; grey where all tokens are equal.
    """
    rows = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    colours = np.full((len(rows), 3), 0.5)
    if not constant(rows):
        points = principal(rows, 3)
        low, high = np.percentile(points, [1, 99], axis=0)
        scaled = (points - low) / np.maximum(high - low, 1e-12)
        colours[:, : points.shape[1]] = np.clip(scaled, 0, 1)
    shaped: Array = np.rint(255 * colours).astype(np.uint8).reshape(*tokens.shape[:2], 3)
    return shaped


def principal(rows: Array, count: int) -> Array:
    """Coordinates of rows along their main directions, (N, n) float64; n is at most ``count``."""
    from sklearn.decomposition import PCA  # slow to import, and seldom used

    count = min(count, *rows.shape)
    points: Array = PCA(count, svd_solver="full").fit_transform(rows)
    return points


def constant(rows: Array) -> bool:
    """Whether all rows are equal up to rounding."""
    return bool(np.ptp(rows, axis=0).max() <= 1e-6 * max(1e-30, np.abs(rows).max()))


def grid(model: ModelSpec) -> tuple[int, int]:
    """Rows and columns of the final patches or of the last feature map; L is their product."""
    if isinstance(model, VitSpec):
        return model.grid
    height, width = model.size
    # The stride of a ResNet's last three stages is 2 each; that of its stem is 4 or 1.
    stride = 32 if model.stem == "imagenet" else 8
    return -(-height // stride), -(-width // stride)
