"""MoCo v1 and v2: queue, shuffled keys, virtual ranks and the order of a step, on every backend."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import assert_close
from hypothesis import given
from hypothesis import strategies as st
from support.marks import marked
from support.native import TINY, draws, hyper, lively_state, random_batch, tiny_spec

from triptych.core import reference
from triptych.core.contracts import Batch, Replicas, Step
from triptych.core.methods import moco, ring
from triptych.core.methods.losses import queue_logits

CASE = "moco_v2_bottleneck"
QUEUES = [name for name, given in TINY.items() if "queue_size" in given["method"]]


@pytest.fixture(scope="module")
def engines(backend):
    """The backend's engine and the reference's, in the same state."""
    spec = tiny_spec(case=CASE)
    return [package.build(spec, lively_state(spec)) for package in (backend, reference)]


# ------------------------------------------------------------------------------------------- queue


@given(st.integers(1, 40), st.data())
def test_keys_go_round_the_queue_column_by_column(size, data):
    pointer = data.draw(st.integers(0, size - 1))
    count = data.draw(st.integers(0, size))
    columns = np.arange(size)
    keys = 100 + np.arange(count)
    want = columns.copy()
    for i, key in enumerate(keys):
        want[(pointer + i) % size] = key
    for place, rows in ring.segments(pointer, count, size):
        columns[place] = keys[rows]
    np.testing.assert_array_equal(columns, want)
    assert ring.advance(pointer, count, size) == (pointer + count) % size


@pytest.mark.parametrize(("pointer", "count"), [(0, 21), (20, 1), (-1, 1)])
def test_what_does_not_fit_into_a_queue_is_refused(pointer, count):
    with pytest.raises(ValueError, match="queue of 20"):
        list(ring.segments(pointer, count, 20))


def enqueued(engine, spec, steps):
    """The queue that the recorded keys should have left, by the plainest rule."""
    want = engine.export_state()["memory.queue"]
    for step in range(steps):
        values, _ = engine.trace_step(random_batch(spec, step), draws(spec, step), hyper(step))
        for i, key in enumerate(values["feature/key"]):
            want[:, (8 * step + i) % want.shape[1]] = key
    return want


@pytest.mark.parametrize(
    ("case", "size"),
    [
        pytest.param(QUEUES[0], 8, marks=pytest.mark.one_backend),
        (QUEUES[0], 16),
        pytest.param(QUEUES[1], 20, marks=pytest.mark.one_backend),
    ],
)
def test_the_queue_holds_the_latest_keys_in_order(backend, case, size):
    spec = tiny_spec(case=case, method={"queue_size": size})
    engine = backend.build(spec, lively_state(spec))
    want = enqueued(engine, spec, 5)
    state = engine.export_state()
    np.testing.assert_array_equal(state["memory.queue"], want)
    assert int(state["memory.pointer"]) == 40 % size
    assert state["memory.pointer"].dtype == np.int64


def test_differentiating_alone_leaves_the_queue_as_it_was(engines):
    spec = tiny_spec(case=CASE)
    before = engines[0].export_state()
    engines[0].loss_and_grads(random_batch(spec), draws(spec), hyper())
    after = engines[0].export_state()
    assert all(np.array_equal(before[n], after[n]) for n in before if n.startswith("memory."))


def early(step, part, features, targets, number):
    """The keys enter before the backward pass, and no copy of the queue was made."""
    outcome = LOSS(step, part, features, targets, number)
    with step.ops.no_grad():
        step.model.memory.enqueue(targets["key"])
    return outcome


LOSS = moco.loss


def gradient_error(backend, loss_of_step, monkeypatch):
    """Relative error of a gradient's largest element; inf where the framework refuses to give one.

    Measured against differences of losses, which no early key can touch: a reference that made the
    same mistake would agree with it.
    """
    spec, name = tiny_spec(case=CASE), "student.projector.0.weight"
    monkeypatch.setattr(moco, "loss", loss_of_step)
    # At an EMA of 1 the keys do not move with the student.
    inputs = random_batch(spec), draws(spec), hyper(ema=1.0)
    try:
        _, gradients = backend.build(spec, lively_state(spec)).loss_and_grads(*inputs)
    except (RuntimeError, ValueError, OSError):
        return np.inf
    largest = np.unravel_index(np.abs(gradients[name]).argmax(), gradients[name].shape)

    def loss(change):
        engine = backend.build(spec, lively_state(spec))
        state = engine.export_state()
        state[name] = state[name].copy()
        state[name][largest] += change
        engine.import_state(state)
        return float(engine.loss_and_grads(*inputs)[0]["loss"])

    monkeypatch.setattr(moco, "loss", LOSS)
    difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
    return abs(gradients[name][largest] - difference) / abs(difference)


@pytest.mark.one_backend
def test_keys_that_enter_before_the_backward_pass_are_noticed(backend, monkeypatch):
    assert gradient_error(backend, LOSS, monkeypatch) < 1e-6
    assert gradient_error(backend, early, monkeypatch) > 1e-3


# -------------------------------------------------------------------------------------------- loss


def test_loss_of_a_case_by_hand(engines):
    """Two queries in three dimensions, a queue of four, T 0.2."""
    query, key = [[1, 0, 0], [0, 1, 0]], [[0.8, 0.6, 0], [0, 0.6, 0.8]]
    queue = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0.6, 0.8]]).T
    logits = [[4, 5, 0, 0, 0], [3, 0, 5, 0, 3]]
    for engine in engines:
        ops = engine.ops
        tensors = (engine.tensor(np.array(a, np.float64)) for a in (query, key, queue))
        got = queue_logits(ops, *tensors, temperature=0.2)
        np.testing.assert_allclose(engine.array(got), logits, atol=1e-12)
        loss = ops.cross_entropy(got, ops.labels(np.zeros(2, np.int64), got))
        assert float(engine.array(loss)) == pytest.approx(1.789013, abs=1e-6)


def test_as_many_images_as_classes_are_still_labels(engines):
    """With N = 1 + K some cross-entropies take the labels for probabilities."""
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((9, 9))
    want = np.mean(np.log(np.exp(logits).sum(1)) - logits[:, 0])
    for engine in engines:
        tensor = engine.tensor(logits)
        loss = engine.ops.cross_entropy(tensor, engine.ops.labels(np.zeros(9, np.int64), tensor))
        assert float(engine.array(loss)) == pytest.approx(want, rel=1e-12)


def test_chance_is_the_loss_of_equal_features(engines):
    spec = tiny_spec(case=CASE)
    one = np.zeros((8, 16))
    one[:, 3] = 1.0
    queue = np.zeros((16, 20))
    queue[3] = 1.0
    for engine in engines:
        tensors = (engine.tensor(array) for array in (one, one, queue))
        logits = queue_logits(engine.ops, *tensors, temperature=0.2)
        loss = engine.ops.cross_entropy(logits, engine.ops.labels(np.zeros(8, np.int64), logits))
        assert float(engine.array(loss)) == pytest.approx(moco.chance(spec), rel=1e-12)


@pytest.mark.parametrize(("size", "steps"), [(8, 1), (16, 2), (20, 3)])
def test_a_loss_is_judged_once_the_queue_holds_keys_only(size, steps):
    assert moco.settled(tiny_spec(case=CASE, method={"queue_size": size})) == steps


# ------------------------------------------------------------------------- shuffle and statistics


def test_every_step_has_a_permutation_of_its_own():
    spec = tiny_spec(case=CASE)
    drawn = [draws(spec, step)["shuffle_perm"] for step in (0, 1, 0)]
    assert all(sorted(order) == list(range(8)) for order in drawn)
    assert np.array_equal(drawn[0], drawn[2]) and not np.array_equal(drawn[0], drawn[1])
    other = draws(spec.model_copy(update={"seed": 1}))["shuffle_perm"]
    assert not np.array_equal(drawn[0], other)


class Recording:
    """A model whose key of an image tells which image it was."""

    def __init__(self, engine):
        self.engine, self.seen = engine, None
        self.memory = self
        self.queue = engine.tensor(np.eye(4))

    def encoded(self, branch, view):
        if branch == "teacher":
            self.seen = self.engine.array(view)
        return view

    def projected(self, branch, features):
        return features

    def update_teacher(self, momentum):
        assert momentum == 0.9


def test_keys_come_back_in_the_order_of_their_queries(engines):
    """Two ranks of two images: the first encodes images 2 and 0, the second 3 and 1."""
    order = np.array([2, 0, 3, 1])
    for engine in engines:
        model, images = Recording(engine), engine.tensor(np.eye(4))
        method, drawn = tiny_spec(case=CASE).method, {"shuffle_perm": order}
        step = Step(engine.ops, model, method, drawn, hyper(), Replicas())
        batch = Batch((images, images), np.arange(4))
        batch = replace(batch, places=moco.places(step, batch, batch))
        targets = moco.targets(step, [batch])
        outcome = moco.loss(step, batch, images, targets.values[0], 0)
        np.testing.assert_array_equal(model.seen.argmax(1), order)
        np.testing.assert_array_equal(engine.array(targets.features["key"]), np.eye(4))
        assert float(engine.array(outcome.metrics["acc1"])) == 0.0  # the queue has the keys as well


def outputs(engine, branch, images):
    """What encoder and heads give in training mode."""
    model = engine.model
    return engine.array(model.projected(branch, model.encoded(branch, engine.tensor(images))))


@pytest.mark.parametrize(
    "case",
    marked(
        ["moco_v2_bottleneck", "moco_v3_vit_conv", "moco_v3_resnet18"],
        ("moco_v2_bottleneck", "moco_v3_vit_conv"),
        pytest.mark.one_backend,
    ),
)
@pytest.mark.parametrize(
    "branch", ["student", pytest.param("teacher", marks=pytest.mark.one_backend)]
)
def test_virtual_ranks_are_parts_by_themselves(backend, case, branch):
    """The features of each part, and the running statistics of the first, as if it were alone."""
    split, whole = (tiny_spec(case=case, batch_norm={"virtual_ranks": r}) for r in (4, 1))
    images = random_batch(split).views[0].astype(np.float64)
    for package in (backend, reference):
        engine = package.build(split, lively_state(split))
        got = outputs(engine, branch, images)
        parts = []
        for i in range(0, 8, 2):
            alone = package.build(whole, lively_state(whole))
            parts.append(outputs(alone, branch, images[i : i + 2]))
            if i == 0:
                first = alone.export_state()
        assert_close(got, np.concatenate(parts), 1e-9, branch)
        state = engine.export_state()
        for name in state:
            if "running_" in name or name.endswith("tracked"):
                assert_close(state[name], first[name], 1e-12, name)


def test_virtual_ranks_are_not_the_whole_batch(backend):
    images = random_batch(tiny_spec(case=CASE)).views[0]
    found = []
    for ranks in (1, 2):
        spec = tiny_spec(case=CASE, batch_norm={"virtual_ranks": ranks})
        engine = backend.build(spec, lively_state(spec))
        found.append(outputs(engine, "student", images))
    assert np.abs(found[0] - found[1]).max() > 1e-2


def test_virtual_ranks_end_with_training(backend):
    found = []
    for ranks in (1, 2):
        spec = tiny_spec(case=CASE, batch_norm={"virtual_ranks": ranks})
        engine = backend.build(spec, lively_state(spec))
        found.append(engine.embed(random_batch(spec).views[0])["final"])
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("case", TINY)
def test_the_teacher_follows_parameters_and_not_statistics(backend, case):
    spec = tiny_spec(case=case)
    engine = backend.build(spec, lively_state(spec))
    before = engine.export_state()
    for _ in range(3):
        engine.model.update_teacher(0.9)
    after = engine.export_state()
    for name in after:
        if not name.startswith("teacher."):
            np.testing.assert_array_equal(after[name], before[name])
        elif "running_" in name or name.endswith("tracked"):
            np.testing.assert_array_equal(after[name], before[name])
        else:
            student = before[name.replace("teacher.", "student.", 1)]
            want = 0.9**3 * before[name] + (1 - 0.9**3) * student
            np.testing.assert_allclose(after[name], want, rtol=0, atol=1e-14)
