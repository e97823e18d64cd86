"""The shared loss against brute force written from the paper's equation."""

import math

import numpy as np
import pytest

from triptych.core.methods.health import feature_std
from triptych.core.methods.losses import info_nce, symmetric_info_nce
from triptych.core.reference import ops

RNG = np.random.default_rng(5)


def brute_force(queries, keys, labels, temperature):
    """Equation 1 of MoCo v3 by loops over scalars, times 2 T."""
    total = 0.0
    for query, label in zip(queries, labels, strict=True):
        scores = []
        for key in keys:
            dot = sum(a * b for a, b in zip(query, key, strict=True))
            lengths = math.sqrt(sum(a * a for a in query)) * math.sqrt(sum(b * b for b in key))
            scores.append(math.exp(dot / lengths / temperature))
        total -= math.log(scores[label] / sum(scores))
    return 2 * temperature * total / len(queries)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_info_nce_against_loops(temperature):
    queries, keys = RNG.standard_normal((4, 5)), RNG.standard_normal((7, 5))
    labels = np.array([3, 4, 5, 6])  # gathered keys: this rank's positives start at row 3
    value = info_nce(
        ops, ops.l2_normalize(queries), ops.l2_normalize(keys), labels, temperature=temperature
    )
    assert value == pytest.approx(brute_force(queries, keys, labels, temperature), rel=1e-13)
    shifted = brute_force(queries, keys, labels - 3, temperature)
    assert value != pytest.approx(shifted, rel=1e-3)


def test_symmetric_loss_crosses_the_views():
    q1, q2, k1, k2 = RNG.standard_normal((4, 6, 5))
    loss, (one, two) = symmetric_info_nce(ops, q1, q2, k1, k2, temperature=0.2)
    labels = np.arange(6)
    assert one == pytest.approx(brute_force(q1, k2, labels, 0.2), rel=1e-13)
    assert two == pytest.approx(brute_force(q2, k1, labels, 0.2), rel=1e-13)
    assert loss == one + two


def test_chance_is_the_loss_of_equal_keys():
    from support.native import tiny_spec

    from triptych.core.methods import moco_v3

    spec = tiny_spec()
    n = spec.train.batch_size
    same = np.ones((n, 4))
    loss, _ = symmetric_info_nce(ops, same, same, same, same, temperature=0.2)
    assert loss == pytest.approx(moco_v3.chance(spec), rel=1e-13)


def test_feature_std_is_one_on_the_sphere_and_zero_in_a_point():
    assert feature_std(RNG.standard_normal((4000, 32))) == pytest.approx(1.0, abs=0.01)
    assert feature_std(np.ones((10, 8))) == pytest.approx(0.0, abs=1e-12)
    half = np.ones((10, 1)) + 0.0
    assert feature_std(np.concatenate([half, half * 0], axis=1)) < 1e-12
