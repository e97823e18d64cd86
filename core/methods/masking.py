"""Which patches MOCA shows its student, and which it decodes (arXiv 2307.09361, section 3.3).

An order of an image's tokens says all: its first ``visible`` are seen, its first ``decoded`` are
predicted.
"""

import numpy as np
from numpy.typing import NDArray

from triptych.core.config.method import Round

Array = NDArray[np.int64]


def complementary(order: Array, one: Round, two: Round) -> Array:
    """The order of round 2: what round 1 neither showed nor decoded comes first.

    Then what round 1 decoded unseen, so that both predict the same, then the rest, last what round
    1 showed: nothing is visible twice.

    Args:
        order: (N, L) int64, a permutation in each row: the order of round 1.
    """
    shown, masked, rest = np.split(order, [one.visible, one.decoded], axis=1)
    return np.concatenate([rest[:, : two.visible], masked, rest[:, two.visible :], shown], axis=1)


def interior(grid: tuple[int, int], border: int) -> Array:
    """Row-major indices of the tokens that are ``border`` or more from each edge. (M,) int64."""
    rows, columns = grid
    index = np.arange(rows * columns, dtype=np.int64).reshape(grid)
    return index[border : rows - border, border : columns - border].reshape(-1)
