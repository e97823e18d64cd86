"""The state of a run in a word: synthetic histories with a known end, and real chance levels."""

import math
import random

import numpy as np
import pytest

from triptych.core.contracts import Batch
from triptych.core.methods import METHODS, moca
from triptych.core.methods.health import (
    LEARNED,
    PATIENCE,
    STATES,
    WINDOW,
    Health,
    alike,
    judge,
    non_finite,
)

CHANCE = 4 * 0.2 * math.log(256)


def play(losses, spreads=None, chance=CHANCE):
    """The states along a history."""
    health = Health(chance)
    spreads = spreads or [0.9] * len(losses)
    return [health.observe(loss, spread) for loss, spread in zip(losses, spreads, strict=True)]


def noise(scale, count, seed=0):
    rng = random.Random(seed)
    return [rng.gauss(0.0, scale) for _ in range(count)]


START = [CHANCE * (1.01 + x) for x in noise(0.003, 40)]
DESCENT = [CHANCE * (1.01 - 0.02 * i) for i in range(30)]
LOW = [CHANCE * (0.4 + x) for x in noise(0.01, 40)]


def test_a_start_above_chance_is_at_chance():
    assert set(play(START)) == {"at chance"}


def test_a_descent_is_learning():
    states = play(START + DESCENT + LOW)
    assert states[-1] == "learning"
    assert "collapsed" not in states
    assert states.index("learning") < len(START) + 5


@pytest.mark.parametrize("end", [1.0, 1.012, 1.3])
def test_a_return_to_chance_or_above_is_a_collapse(end):
    states = play(START + DESCENT + LOW + [CHANCE * (end + x) for x in noise(0.002, WINDOW)])
    assert states[-1] == "collapsed"
    assert states[-WINDOW] != "collapsed", "one bad batch is not a collapse"


def test_a_recovery_is_learning_again():
    states = play(START + DESCENT + LOW + [CHANCE] * 10 + LOW)
    assert "collapsed" in states
    assert states[-1] == "learning"


def test_a_rise_that_stays_below_chance_is_learning():
    """A MoCo loss often rises after some epochs; users ask whether that is normal. It is."""
    states = play(DESCENT + LOW + [CHANCE * (0.4 + 0.01 * i) for i in range(40)])
    assert states[-1] == "learning"


@pytest.mark.parametrize("before", [START, [CHANCE * 1.05] * 3, []])
def test_a_loss_that_sits_on_the_chance_level_is_a_collapse(before):
    """A run that fell to the constant and stayed there, though it never beat it."""
    constant = [CHANCE * (1 + x) for x in noise(1e-4, PATIENCE)]
    states = play(before + constant)
    assert states[-1] == "collapsed"
    assert states[-2] == "at chance"


def test_equal_features_are_a_collapse_whatever_the_loss_says():
    assert play(LOW, [0.001] * 40)[WINDOW - 1 :] == ["collapsed"] * (41 - WINDOW)


def test_nearly_parallel_features_are_a_collapse_only_at_chance():
    assert play(LOW, [0.05] * 40)[-1] == "learning"
    assert play(START, [0.05] * 40)[-1] == "collapsed"
    assert play(START, [0.2] * 40)[-1] == "at chance"


def test_weak_learning_at_a_high_temperature_counts():
    """With T = 1 and 4096 keys the best loss is 12 % below chance; 33 to 29.5 is a good run."""
    chance = 4 * 1.0 * math.log(4096)
    assert play([33.4] * 10 + [32.0] * 10 + [29.5] * 30, chance=chance)[-1] == "learning"


@pytest.mark.parametrize("best", [0.0, 2 * LEARNED])
def test_judge_is_a_function_of_its_arguments(best):
    losses = [CHANCE * 1.01] * WINDOW
    found = judge(losses, [0.9] * WINDOW, CHANCE, best=best)
    assert found == ("collapsed" if best else "at chance")
    assert found in STATES


def test_a_loss_that_cannot_be_judged_yet_is_not():
    """A queue of random vectors: the loss starts low and climbs to chance without a collapse."""
    climb = [0.2, 4.9, 5.5, 5.9, 6.1, 6.15, 6.2, 6.23, 6.23, 6.23]
    hasty, patient = Health(6.24), Health(6.24)
    for step, loss in enumerate(climb):
        hasty.observe(loss, 0.3)
        patient.observe(loss, 0.3, settled=step >= 4)
        assert step >= 4 or patient.state == "at chance"
    assert (hasty.state, patient.state) == ("collapsed", "at chance")
    for _ in range(PATIENCE):
        patient.observe(5.0, 0.3)
    assert patient.state == "learning"


def test_advice_is_given_once_and_late():
    health = Health(CHANCE)
    for i in range(PATIENCE):
        health.observe(START[i], 0.9)
        assert health.advice(0.5) is None or i == PATIENCE - 1
    assert health.advice(0.5) is None, "already given"


def test_no_advice_in_the_first_tenth_of_a_run():
    health = Health(CHANCE)
    for loss in START:
        health.observe(loss, 0.9)
        assert health.advice(0.05) is None


def test_advice_names_what_to_change():
    stuck, collapsed = Health(CHANCE), Health(CHANCE)
    for loss in START:
        stuck.observe(loss, 0.9)
        collapsed.observe(loss, 0.001)
    assert "optim.lr" in stuck.advice(0.5)
    assert "checkpoint before" in collapsed.advice(0.0)
    assert collapsed.advice(0.5) is None


def test_every_method_that_can_collapse_says_what_to_watch():
    pretraining = {name: method for name, method in METHODS.items() if method.FLAT}
    assert pretraining.keys() == {"moco_v1", "moco_v2", "moco_v3", "moca"}
    for name, method in pretraining.items():
        health = Health(CHANCE, method.FLAT, method.REMEDY)
        for loss in START:
            health.observe(loss, 0.001)
        assert health.state == "collapsed", name
        assert method.REMEDY in health.advice(0.0)


def test_moca_watches_the_words_too():
    """Features may differ while all images have the same words: then there is nothing to learn."""
    values = {"feature_std": 0.2, "word_entropy": 5.0, "bow_entropy": 4.9}
    assert moca.spread(values) == 0.2
    blind = {**values, "bow_entropy": 4.9999}
    health = Health(0.3, moca.FLAT, moca.REMEDY)
    for _ in range(WINDOW):
        health.observe(0.1, moca.spread(blind))
    assert health.state == "collapsed", "whatever the loss"
    nearly_parallel = Health(0.3, moca.FLAT, moca.REMEDY)
    for _ in range(WINDOW):
        nearly_parallel.observe(0.4, moca.spread({**values, "feature_std": 0.04}))
    assert nearly_parallel.state == "at chance", "as in a good run"


def test_features_that_get_worse_are_told_of_once():
    health = Health(CHANCE, remedy="wait")
    told = [
        health.evaluated(title, score)
        for title, score in (("k-NN", 0.8), ("linear", 0.1), ("k-NN", 0.78), ("k-NN", 0.74))
    ]
    assert [text is not None for text in told] == [False, False, False, True]
    assert "k-NN 74.0 % after 80.0 %" in told[3] and told[3].endswith("wait")
    assert health.evaluated("k-NN", 0.6) is None


def test_images_that_are_all_alike_are_seen_in_either_view():
    same, other = np.ones((3, 1, 2, 2), np.float32), np.zeros((3, 1, 2, 2), np.float32)
    other[2, 0, 1, 1] = 1e-6
    assert alike(Batch((same, same), np.arange(3)))
    assert alike(Batch((other, same), np.arange(3)))
    assert not alike(Batch((other, other), np.arange(3)))


def test_a_sweep_is_judged_by_its_best_classifier():
    values = {"loss": 60.0, "loss_0": 2.2, "loss_1": 117.8, "feature_std": 0.2}
    assert METHODS["linear"].judged(values) == 2.2
    assert METHODS["linear"].status(values) == ["best of 2: loss 2.200"]
    one = {"loss": 2.1, "acc1": 30.0}
    assert METHODS["linear"].judged(one) == METHODS["finetune"].judged(one) == 2.1
    assert METHODS["linear"].status(one) == ["acc1 30.0 %"]
    views = {"loss": 3.0, "loss_q1k2": 1.0}
    assert METHODS["moco_v3"].judged(views) == 3.0


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "int64", "bool"])
def test_infinities_and_nans_are_counted(dtype: str):
    values = np.ones((3, 5), dtype)
    assert non_finite(values) == non_finite(values[:0]) == 0
    if values.dtype.kind in "fc":
        values[0, 0], values[1, 1], values[2, 2] = np.inf, -np.inf, np.nan
        assert non_finite(values) == non_finite(values.T) == 3
        values[:] = np.finfo(dtype).max  # their sum is infinite
        assert non_finite(values) == 0
