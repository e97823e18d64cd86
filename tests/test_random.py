"""Streams are pure functions of (seed, name, counters), and no two of them meet."""

import numpy as np
import pytest

from triptych.core.random import stream


def draw(*arguments):
    return stream(*arguments).integers(0, 2**63, 4).tolist()


def test_a_stream_is_the_same_every_time():
    assert draw(3, "augment", 1, 2, 0) == draw(3, "augment", 1, 2, 0)


def test_first_numbers_are_fixed_for_ever():
    # Runs resume across versions of this code: these numbers may never change.
    assert stream(0, "order").permutation(8).tolist() == FIXED_ORDER
    np.testing.assert_array_equal(stream(1, "augment", 2, 3, 1).random(2), FIXED_UNIFORM)


FIXED_ORDER = [2, 1, 5, 7, 3, 4, 0, 6]
FIXED_UNIFORM = [0.15889502750102946, 0.3362163616566215]


def test_different_points_differ():
    points = [
        (seed, name, epoch, index, view)
        for seed in (0, 1, 2)
        for name in ("augment", "order")
        for epoch in (0, 1, 2)
        for index in (0, 1, 2)
        for view in (0, 1)
    ]
    assert len({tuple(draw(*point)) for point in points}) == len(points)


def test_long_draws_do_not_run_into_the_next_counter():
    one = stream(0, "augment", 0, 0).random(100_000)
    two = stream(0, "augment", 0, 1).random(100_000)
    assert len(np.intersect1d(one, two)) == 0


@pytest.mark.parametrize("counters", [(-1,), (0, 0, 0, 0)])
def test_impossible_counters_are_refused(counters):
    with pytest.raises(ValueError, match="counters"):
        stream(0, "augment", *counters)
