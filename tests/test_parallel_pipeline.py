"""The order of work in a pipeline: nobody waits for ever, few activations, the true gradients."""

from itertools import product

import numpy as np
import pytest
from support.processes import together

from triptych.core.parallel.pipeline import (
    Work,
    forward_only,
    in_flight,
    one_forward_one_backward,
    run,
)

SIZES = list(product(range(1, 6), range(1, 9)))


def meets(sender, receiver):
    """Whether the first piece of work sends what the second one, of the next stage, receives."""
    pairs = {"send features": "receive features", "send gradient": "receive gradient"}
    return pairs.get(sender.kind) == receiver.kind and sender.part == receiver.part


def finished(orders):
    """Whether all stages come to their end, if a send waits until its receiver is there."""
    left = [list(order) for order in orders]
    moved = True
    while moved:
        moved = False
        for i, order in enumerate(left):
            if order and order[0].kind in ("forward", "backward"):
                order.pop(0)
                moved = True
            for other in (i - 1, i + 1):
                if 0 <= other < len(left) and order and left[other]:
                    backwards = order[0].kind.endswith("gradient")
                    if meets(order[0], left[other][0]) and backwards == (other < i):
                        order.pop(0), left[other].pop(0)
                        moved = True
    return not any(left)


@pytest.mark.parametrize("order", [forward_only, one_forward_one_backward])
def test_no_stage_waits_for_ever(order):
    for stages, parts in SIZES:
        assert finished([order(stage, stages, parts) for stage in range(stages)]), (stages, parts)


def test_an_order_that_sends_before_it_receives_waits_for_ever():
    orders = [one_forward_one_backward(stage, 2, 4) for stage in range(2)]
    at = orders[1].index(Work("receive features", 1))
    orders[1][at], orders[1][at + 1] = orders[1][at + 1], orders[1][at]
    assert not finished(orders)


def test_each_micro_batch_passes_once_and_few_are_kept():
    for stages, parts in SIZES:
        for stage in range(stages):
            order = one_forward_one_backward(stage, stages, parts)
            for kind in ("forward", "backward"):
                assert [w.part for w in order if w.kind == kind] == list(range(parts))
            assert in_flight(order) == min(stages - stage, parts)


def test_the_order_of_two_stages_written_out():
    first = "0F 0S 1F 1S 0R 0B 2F 2S 1R 1B 2R 2B"
    second = "0r 0F 0B 1r 0s 1F 1B 2r 1s 2F 2B 2s"
    letters = {
        "receive features": "r",
        "forward": "F",
        "send features": "S",
        "receive gradient": "R",
        "backward": "B",
        "send gradient": "s",
    }
    for stage, written in enumerate((first, second)):
        order = one_forward_one_backward(stage, 2, 3)
        assert " ".join(f"{part}{letters[kind]}" for kind, part in order) == written


class PipeLinks:
    """The connections of a stage over the pipes of a mesh."""

    def __init__(self, mesh):
        self.mesh = mesh
        mesh.strict = False

    def receive_features(self, part):
        return self.mesh.receive(self.mesh.rank - 1)

    def send_features(self, part, features):
        self.mesh.send(features, self.mesh.rank + 1)

    def receive_gradient(self, features):
        gradient = self.mesh.receive(self.mesh.rank + 1)
        assert gradient.shape == features.shape
        return gradient

    def send_gradient(self, gradient):
        self.mesh.send(gradient, self.mesh.rank - 1)


def layer(stage):
    return np.random.default_rng(stage).standard_normal((5, 5))


PARTS = np.random.default_rng(9).standard_normal((4, 3, 5))
"""Four micro-batches of three images."""


def stage_gradient(mesh):
    """The gradient of sum(y^2)/2 by one stage's matrix; y = tanh(... tanh(x A) B ...)."""
    weight, total, kept = layer(mesh.rank), np.zeros((5, 5)), {}

    def forward(part, x):
        kept[part] = PARTS[part] if x is None else x
        return np.tanh(kept[part] @ weight)

    def backward(part, gradient):
        x = kept.pop(part)
        y = np.tanh(x @ weight)
        inner = (y if gradient is None else gradient) * (1 - y * y)
        total[...] += x.T @ inner
        return inner @ weight.T

    order = one_forward_one_backward(mesh.rank, mesh.world, len(PARTS))
    run(order, PipeLinks(mesh), forward, backward)
    return total


@pytest.mark.parametrize("stages", [2, 3])
def test_the_gradients_are_those_of_one_process(stages):
    from autograd import grad
    from autograd import numpy as anp

    def loss(weights):
        y = anp.reshape(PARTS, (-1, 5))
        for weight in weights:
            y = anp.tanh(y @ weight)
        return anp.sum(y * y) / 2

    wanted = grad(loss)([layer(stage) for stage in range(stages)])
    np.testing.assert_allclose(together(stages, stage_gradient), wanted, rtol=1e-12)
