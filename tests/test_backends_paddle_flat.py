"""Packed parameters, as Paddle has them on a GPU: the same bits by fewer operations."""

from collections import Counter

import numpy as np
import pytest
from support.native import TINY, draws, hyper, random_batch, tiny_spec
from support.paddle_engines import build, framework

from triptych.core import contracts
from triptych.core.optim.groups import Group

RNG = np.random.default_rng(0)
WITHOUT_LAUNCH = ("flatten", "full")
"""A view, and the zeros between tensors of odd sizes, which the real networks lack."""


@pytest.fixture(scope="module", autouse=True)
def paddle():
    return framework()


def packed(monkeypatch):
    """From here on engines and optimizers are made as on a GPU."""
    from triptych.backends.paddle import methods, optim

    for module in (methods, optim):
        monkeypatch.setattr(module, "plain_forms_serve", lambda x: True)


def trained(case, steps=3, state=None):
    """An engine after some steps of training."""
    engine = build("float64", case=case)
    if state is not None:
        engine.import_state(state)
    for step in range(engine.steps_done(), engine.steps_done() + steps):
        engine.train_step(random_batch(engine.spec, step), draws(engine.spec, step), hyper(step))
    return engine


@pytest.mark.parametrize("case", TINY)
def test_packed_parameters_have_the_same_bits(monkeypatch, case):
    want = trained(case, 4).export_state()
    packed(monkeypatch)
    begun = trained(case, 2)
    resumed = trained(case, 2, begun.export_state())
    got = resumed.export_state()
    assert got.keys() == want.keys()
    assert [name for name in want if not np.array_equal(got[name], want[name])] == []
    assert resumed.optimizer._packs and resumed.model._packed is not None


def test_on_the_cpu_nothing_is_packed():
    engine = build()
    assert not engine.optimizer._packs and engine.model._packed is None


def test_tensors_become_views_of_a_buffer(paddle):
    from triptych.backends.paddle import flat

    arrays = [RNG.standard_normal(shape) for shape in ((3, 5), (1,), (64,), (2, 3, 4))]
    tensors = [paddle.to_tensor(array) for array in arrays]
    buffer = flat.pack(tensors)
    assert buffer.shape == [64 * 4]
    np.testing.assert_array_equal(flat.join(tensors).numpy(), buffer.numpy())
    buffer.scale_(2.0)
    for tensor, array in zip(tensors, arrays, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), 2.0 * array)
        assert (tensor.data_ptr() - buffer.data_ptr()) % 256 == 0
    tensors[3].set_value(arrays[3])
    np.testing.assert_array_equal(buffer.numpy()[128 + 64 : 128 + 64 + 24], arrays[3].ravel())
    assert not buffer.numpy()[128 + 64 + 24 :].any()


def test_parts_are_views_of_all_rows(paddle, monkeypatch):
    from triptych.backends.paddle import flat

    monkeypatch.setattr(flat, "PART", 12)
    one, other = (paddle.to_tensor(RNG.standard_normal((7, 2, 3))) for _ in range(2))
    want = one.numpy() + other.numpy()
    sizes = []
    for target, source in flat.parts(one, other):
        sizes.append(len(target))
        target.add_(source)
    assert sizes == [2, 2, 2, 1]
    np.testing.assert_array_equal(one.numpy(), want)
    assert [x[0].shape for x in flat.parts(paddle.ones([2, 50]))] == [[1, 50]] * 2
    small = paddle.ones([12])
    assert next(flat.parts(small))[0] is small


@pytest.mark.parametrize("rule", ["adamw", "sgd", "lars"])
def test_an_update_by_parts_has_the_same_bits(monkeypatch, rule):
    from triptych.backends.paddle import flat

    parts, counts, found = flat.parts, [], []
    monkeypatch.setattr(
        flat, "parts", lambda *x: [counts.append(len(found)) or part for part in parts(*x)]
    )
    for size in (flat.PART, 100):
        monkeypatch.setattr(flat, "PART", size)
        found.append(trained(OF_RULE[rule]).export_state())
    want, got = found
    assert [name for name in want if not np.array_equal(got[name], want[name])] == []
    assert counts.count(1) > 1.5 * counts.count(0) > 0


@pytest.mark.parametrize("case", ["moco_v3_vit", "moco_v3_resnet18"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_teacher_moves_by_a_part_of_the_difference(precision, case):
    """To the last bit: equal values stay equal."""
    engine = build(precision, case=case)
    branches = engine.model.student, engine.model.teacher
    student, teacher = (dict(branch.named_parameters()) for branch in branches)
    before = {name: x.numpy() for name, x in teacher.items()}
    engine.model.update_teacher(0.9)
    for name, old in before.items():
        moved = old + (student[name].numpy() - old) * old.dtype.type(1.0 - 0.9)
        np.testing.assert_array_equal(teacher[name].numpy(), moved, name)


@pytest.mark.parametrize("rule", ["adamw", "sgd", "lars"])
def test_a_parameter_without_gradient_stays_as_it_is(paddle, monkeypatch, rule):
    from triptych.backends.paddle import optim

    arrays = {name: RNG.standard_normal((4, 3)) for name in "abc"}
    found = []
    for pack in (False, True):
        with monkeypatch.context() as patch:
            if pack:
                packed(patch)
            named = {n: paddle.to_tensor(a, stop_gradient=False) for n, a in arrays.items()}
            spec = tiny_spec(case=OF_RULE[rule]).optim
            optimizer = optim.OPTIMIZERS[rule](named, spec, dict.fromkeys(named, Group()))
            for used in ("abc", "ac", "abc"):
                optimizer.zero_grad()
                sum((named[n] * named[n] * i).sum() for i, n in enumerate(used, 1)).backward()
                before = named["b"].numpy()
                optimizer.step(hyper(lr=0.1))
                assert np.array_equal(named["b"].numpy(), before) == ("b" not in used)
        moments = [m for kind in optimizer.moments().values() for m in kind.values()]
        found.append([x.numpy() for x in (*named.values(), *moments)])
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))


OF_RULE = {"adamw": "moco_v3_vit", "sgd": "moco_v1_resnet18", "lars": "moco_v3_resnet18"}


class Copies(contracts.Group):
    """One of two copies of a model, which nothing comes from."""

    rank, count = 1, 2

    def broadcast(self, x, source=0):
        """Leaves what this copy has."""


def test_a_copy_packs_what_it_updates(paddle, monkeypatch):
    from triptych.backends.paddle import optim

    sizes = {"a": 40, "b": 30, "c": 20, "d": 10}
    arrays = {name: RNG.standard_normal(size) for name, size in sizes.items()}
    found = []
    for pack in (False, True):
        with monkeypatch.context() as patch:
            if pack:
                packed(patch)
            named = {n: paddle.to_tensor(a, stop_gradient=False) for n, a in arrays.items()}
            members = {n: Group(decay=0.0 if n in "ab" else None) for n in named}
            optimizer = optim.AdamW(named, tiny_spec().optim, members, copies=Copies())
            sum((p * p).sum() for p in named.values()).backward()
            optimizer.step(hyper())
        own = {*optimizer.moments()["exp_avg"]}
        assert 0 < len(own) < 4
        assert {n for n in named if not np.array_equal(named[n].numpy(), arrays[n])} == own
        if pack:
            assert {name for each in optimizer._packs for name in each.names} == own
        found.append([p.numpy() for p in named.values()])
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))


def launches(paddle, function):
    """Kernel -> number of launches, as Paddle's profiler counts them."""
    profiler = paddle.profiler
    # Without a function for its trace, the profiler writes a file to the current folder.
    profile = profiler.Profiler(
        targets=[profiler.ProfilerTarget.CPU], on_trace_ready=lambda profile: None
    )
    with profile:
        function()
    found = Counter()

    def visit(node):
        name, _, rest = node.name.partition(" ")
        if rest == "kernel launch":
            found[name] += 1
        for child in node.children_node:
            visit(child)

    for thread in profile.profiler_result.get_data().values():
        visit(thread)
    return {name: count for name, count in found.items() if name not in WITHOUT_LAUNCH}


@pytest.mark.parametrize(
    ("case", "rule", "count"),
    [("moco_v3_vit", 13, 1), ("moca_vit", 13, 4), ("moco_v2_bottleneck", 6, 1)],
)
def test_launches_of_an_update(paddle, monkeypatch, case, rule, count):
    """The operations of a rule for each group instead of each tensor; and one join for each."""
    if paddle.__version__.startswith("2.6"):
        pytest.skip("the profiler of Paddle 2.6 does not count launches")
    counts = []
    for pack in (False, True):
        with monkeypatch.context() as patch:
            if pack:
                packed(patch)
            engine = build("float32", case=case)
        engine.optimizer.clip_norm = None
        engine.loss_and_grads(random_batch(engine.spec), draws(engine.spec), hyper())
        update = launches(paddle, lambda engine=engine: engine.optimizer.step(hyper()))
        teacher = launches(paddle, lambda engine=engine: engine.model.update_teacher(0.9))
        counts.append((sum(update.values()), sum(teacher.values())))
    followed = [3 if target.ndim > 2 else 1 for target, _ in engine.model._pairs]
    assert counts[0] == (rule * len(engine.optimizer.named), sum(followed))
    assert counts[1] == ((rule + 1) * count, 2)
    assert len(followed) > 30
