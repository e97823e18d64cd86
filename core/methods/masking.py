"""The masks of MOCA (arXiv 2307.09361, section 3.3).

A permutation of an image's tokens defines a mask. The student sees its first ``visible`` tokens,
and the decoder predicts its first ``decoded`` tokens.
"""

import numpy as np
from numpy.typing import NDArray

from triptych.core.config.method import Round

Array = NDArray[np.int64]


def complementary(order: Array, round1: Round, round2: Round) -> Array:
    """The token order of round 2, given that of round 1.

    The order of round 2 is, with tokens named after their part in round 1:
        1. as many tokens as round 2 shows, of those neither shown nor decoded;
        2. the tokens decoded but not shown, so that both rounds predict them;
        3. the remaining tokens neither shown nor decoded;
        4. the shown tokens, so that no token is visible twice.

    Args:
        order: (N, L) int64, the order of round 1: each row is a permutation.
        round1: token numbers of round 1.
        round2: token numbers of round 2.

    Returns:
        (N, L) int64.
    """
    shown, masked, rest = np.split(order, [round1.visible, round1.decoded], axis=1)
    fresh = rest[:, : round2.visible]
    return np.concatenate([fresh, masked, rest[:, round2.visible :], shown], axis=1)


def interior(grid: tuple[int, int], border: int) -> Array:
    """Indices of the tokens at least ``border`` rows and columns from each edge.

    Returns:
        (M,) int64, row-major.
    """
    rows, columns = grid
    index = np.arange(rows * columns, dtype=np.int64).reshape(grid)
    return index[border : rows - border, border : columns - border].reshape(-1)
