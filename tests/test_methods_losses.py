"""The shared loss against brute force written from the paper's equation."""

import math

import numpy as np
import pytest
from support.native import draws, hyper, lively_state, random_batch, tiny_spec

from triptych.core import reference
from triptych.core.methods import moco_v3
from triptych.core.methods.health import feature_std
from triptych.core.methods.losses import info_nce
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


def test_moco_v3_crosses_the_views():
    """Features and metrics of a step: query 1 meets key 2, query 2 key 1."""
    spec = tiny_spec()
    engine = reference.build(spec, lively_state(spec))
    values, _ = engine.loss_and_grads(random_batch(spec), draws(spec), hyper())
    q1, q2, k1, k2 = (values[f"feature/{name}"] for name in ("q1", "q2", "k1", "k2"))
    labels = np.arange(spec.train.batch_size)
    one, two = brute_force(q1, k2, labels, 0.2), brute_force(q2, k1, labels, 0.2)
    assert values["loss_q1k2"] == pytest.approx(one, rel=1e-13)
    assert values["loss_q2k1"] == pytest.approx(two, rel=1e-13)
    assert values["loss"] == values["loss_q1k2"] + values["loss_q2k1"]


def test_chance_is_the_loss_of_equal_keys():
    spec = tiny_spec()
    same = ops.l2_normalize(np.ones((spec.train.batch_size, 4)))
    loss = 2 * info_nce(ops, same, same, np.arange(len(same)), temperature=0.2)
    assert loss == pytest.approx(moco_v3.chance(spec), rel=1e-13)


def test_feature_std_is_one_on_the_sphere_and_zero_in_a_point():
    assert feature_std(RNG.standard_normal((4000, 32))) == pytest.approx(1.0, abs=0.01)
    assert feature_std(np.ones((10, 8))) == pytest.approx(0.0, abs=1e-12)
    half = np.ones((10, 1)) + 0.0
    assert feature_std(np.concatenate([half, half * 0], axis=1)) < 1e-12
