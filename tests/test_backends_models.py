"""The whole model of every backend against the float64 NumPy reference."""

from functools import cache

import numpy as np
import pytest
from conftest import TOLERANCE, assert_close, relative_error
from support.marks import marked
from support.native import TINY, draws, hyper, lively_state, random_batch, tiny_spec

from triptych.core import parameters, reference
from triptych.core.parity.compare import certain, noise_names

WITHOUT_EFFECT = {
    "moco_v3_vit": {"student.encoder.norm.bias"},
    "moco_v3_vit_conv": {"student.encoder.norm.bias"},
}
"""A shift in front of a batch norm moves nothing: its gradient is only rounding."""


def differentiated(package, spec):
    """Metrics, features and gradients of the first step."""
    engine = package.build(spec, lively_state(spec))
    return engine.loss_and_grads(random_batch(spec), draws(spec), hyper())


def trained(engine, spec, steps):
    """The losses of further steps."""
    metrics = (engine.train_step(random_batch(spec, s), draws(spec, s), hyper(s)) for s in steps)
    return [engine.read(values)["loss"] for values in metrics]


# What the reference computes is the same for every backend.
@cache
def expected_gradients(case, precision):
    return differentiated(reference, tiny_spec(precision, case))


@cache
def expected_state(case):
    """The state after three steps with clipped gradients."""
    spec = tiny_spec(case=case, optim={"clip_norm": 1.0})
    engine = reference.build(spec, lively_state(spec))
    trained(engine, spec, range(3))
    return engine.export_state()


@cache
def expected_course(case):
    """The state after three steps, and the losses of the next two."""
    spec = tiny_spec(case=case)
    engine = reference.build(spec, lively_state(spec))
    trained(engine, spec, range(3))
    return engine.export_state(), trained(engine, spec, range(3, 5))


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("case", TINY)
def test_loss_features_and_gradients(backend, case, precision):
    values, grads = differentiated(backend, tiny_spec(precision, case))
    want, want_grads = expected_gradients(case, precision)
    assert set(values) == set(want)
    assert set(grads) == set(want_grads)
    features = {"float64": TOLERANCE["float64"]["features"], "float32": 1e-4}[precision]
    for name in want:
        assert_close(values[name], want[name], features, name)
    noise = noise_names({f"grad/{n}/step0": g for n, g in want_grads.items()}, precision)
    assert WITHOUT_EFFECT.get(case, set()) <= noise
    assert len(noise) < len(want_grads) / 3
    for name in set(want_grads) - noise:
        error = relative_error(
            certain(f"grad/{name}/step0", grads[name]),
            certain(f"grad/{name}/step0", want_grads[name]),
        )
        assert error < {"float64": 1e-10, "float32": 1e-3}[precision], name


def test_gradients_where_a_relu_sits_at_its_kink(backend):
    """With a last gain of 0 a block gives back its input, whose zeros meet the next ReLU."""
    spec = tiny_spec(case="moco_v3_resnet18", model={"zero_init_residual": True})
    state = parameters.initial_state(spec)
    assert not state["student.encoder.layer1.0.bn2.weight"].any()
    engines = backend.build(spec, state), reference.build(spec, state)
    (_, got), (_, want) = (
        e.loss_and_grads(random_batch(spec), draws(spec), hyper()) for e in engines
    )
    noise = noise_names({f"grad/{n}/step0": g for n, g in want.items()}, "float64")
    assert "student.encoder.layer1.0.bn2.bias" not in noise
    for name in set(want) - noise:
        assert relative_error(got[name], want[name]) < 1e-10, name


@pytest.mark.parametrize("case", TINY)
def test_state_after_three_steps(backend, case):
    spec = tiny_spec(case=case, optim={"clip_norm": 1.0})
    state = lively_state(spec)
    engine = backend.build(spec, state)
    trained(engine, spec, range(3))
    # What matters is what moved: a state that stayed at its start would be close as well.
    got, want = engine.export_state(), expected_state(case)
    assert set(got) == set(want)
    for name, value in want.items():
        start = state.get(name, np.zeros_like(value))
        moved = np.abs(value - start).max()
        if moved > 1e-4:
            assert np.abs(got[name] - value).max() / moved < 1e-8, name
    assert int(got["optimizer.step"]) == 3
    passes = 2 if spec.method.name == "moco_v3" else 1
    for name in want:
        if name.endswith("num_batches_tracked"):
            assert int(got[name]) == 3 * passes, name


@pytest.mark.parametrize("case", TINY)
def test_embedding(backend, case):
    spec = tiny_spec(case=case)
    state = lively_state(spec)
    images = random_batch(spec).views[0]
    projects = spec.method.name != "moca"
    engines = backend.build(spec, state), reference.build(spec, state)
    for branch in ("student", "teacher"):
        for tokens in ("cls", "mean", "all"):
            options = {"branch": branch, "layers": (0,), "tokens": tokens, "projection": projects}
            got, want = (engine.embed(images, **options) for engine in engines)
            assert set(got) == {"final", "layer0", *(["projection"] if projects else [])}
            for name in want:
                assert_close(got[name], want[name], 1e-12, f"{branch} {tokens} {name}")


@pytest.mark.parametrize("case", [name for name in TINY if "vit" in name])
def test_attention_of_the_class_token(backend, case):
    """Rectangular images; one block with a convolutional stem, and several blocks."""
    spec = tiny_spec(case=case)
    state = lively_state(spec)
    images = random_batch(spec).views[0]
    rows, columns = spec.model.grid
    engines = backend.build(spec, state), reference.build(spec, state)
    for branch in ("student", "teacher"):
        got, want = (engine.attention(images, branch=branch) for engine in engines)
        assert got.shape == (8, 4, 1 + rows * columns)
        assert_close(got, want, 1e-12, branch)
        assert_close(got.sum(-1), np.ones((8, 4)), 1e-12, branch)
        # Equal weights would pass for any order of tokens and heads.
        assert got.std(-1).min() > 1e-3 and got.std(1).max() > 1e-3


def test_a_residual_network_has_no_attention(backend):
    spec = tiny_spec(case="moco_v1_resnet18")
    engine = backend.build(spec, lively_state(spec))
    with pytest.raises(ValueError, match="resnet18 has no class token"):
        engine.attention(random_batch(spec).views[0])


@pytest.mark.parametrize(
    "case", marked(TINY, ("moco_v2_bottleneck", "moco_v3_resnet18"), pytest.mark.one_backend)
)
def test_embedding_leaves_the_state_alone(backend, case):
    spec = tiny_spec(case=case)
    engine = backend.build(spec, lively_state(spec))
    before = engine.export_state()
    engine.embed(random_batch(spec).views[0], projection=spec.method.name != "moca")
    after = engine.export_state()
    assert all(np.array_equal(before[n], after[n]) for n in before)
    engine.train_step(random_batch(spec), draws(spec), hyper())
    statistics = next(name for name in before if name.endswith("running_mean"))
    assert not np.array_equal(engine.export_state()[statistics], after[statistics])


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        *((name, "float64") for name in ("moco_v3_vit", "moco_v1_resnet18", "moca_vit")),
        pytest.param("moco_v3_vit_conv", "float64", marks=pytest.mark.one_backend),
        pytest.param("moco_v3_resnet18", "float64", marks=pytest.mark.one_backend),
        pytest.param("moco_v2_bottleneck", "float64", marks=pytest.mark.one_backend),
        pytest.param("moco_v3_vit", "float32", marks=pytest.mark.one_backend),
        pytest.param("moco_v2_bottleneck", "float32", marks=pytest.mark.one_backend),
    ],
)
def test_a_state_moves_to_a_fresh_engine_and_goes_on_bit_for_bit(backend, case, precision):
    spec = tiny_spec(precision, case)
    first = backend.build(spec, lively_state(spec))
    for step in range(2):
        first.train_step(random_batch(spec, step), draws(spec, step), hyper(step))
    state = first.export_state()
    second = backend.build(spec, lively_state(spec))
    second.import_state(state)
    for engine in (first, second):
        for step in range(2, 4):
            engine.train_step(random_batch(spec, step), draws(spec, step), hyper(step))
    one, two = first.export_state(), second.export_state()
    assert all(np.array_equal(one[n], two[n]) for n in one)
    moca = spec.method.name == "moca"
    weight = f"student.{'dense_predictor.last' if moca else 'projector.0'}.weight"
    assert not np.array_equal(one[weight], state[weight])


@pytest.mark.parametrize("case", TINY)
def test_a_state_moves_to_another_framework_and_goes_on(backend, case):
    """Queue, pointer, momentum and statistics included: the reference is the other framework."""
    spec = tiny_spec(case=case)
    engine = backend.build(spec, lively_state(spec))
    state, losses = expected_course(case)
    engine.import_state(state)
    for loss, want in zip(trained(engine, spec, range(3, 5)), losses, strict=True):
        assert_close(loss, want, TOLERANCE["float64"]["features"])
    back = engine.export_state()
    assert set(back) == set(state)
    if "memory.pointer" in back:
        words = spec.method.name == "moca"
        assert int(back["memory.pointer"]) == (5 * 4 % 22 if words else 5 * 8 % 20)


def test_a_wrong_state_is_refused_whole(backend):
    spec = tiny_spec()
    engine = backend.build(spec, lively_state(spec))
    before = engine.export_state()
    wrong = {n: a + 1 for n, a in before.items()}
    wrong["student.encoder.extra"] = wrong.pop("student.encoder.cls_token")
    wrong["student.encoder.norm.bias"] = np.zeros(3)
    with pytest.raises(ValueError) as caught:
        engine.import_state(wrong)
    for part in ("missing student.encoder.cls_token", "unused student.encoder.extra", "norm.bias"):
        assert part in str(caught.value)
    after = engine.export_state()
    assert all(np.array_equal(before[n], after[n]) for n in before)


def test_precision_that_a_device_lacks_is_refused_by_name(backend, backend_name):
    from triptych.core.errors import UserError

    spec = tiny_spec("tf32")
    with pytest.raises(UserError, match=f"precision: {backend_name} has no tf32"):
        backend.build(spec, lively_state(spec))
    spec = tiny_spec().model_copy(update={"device": "cuda:7"})
    with pytest.raises(UserError, match=f"device: 'cuda:7', but {backend_name} sees"):
        backend.build(spec, lively_state(spec))


def test_a_step_that_is_not_logged_lacks_metrics_and_changes_nothing_else(backend):
    spec = tiny_spec(case="moca_vit")
    found, states = [], []
    for monitor in (True, False):
        engine = backend.build(spec, lively_state(spec))
        metrics = engine.train_step(random_batch(spec), draws(spec), hyper(), monitor=monitor)
        found.append(engine.read(metrics))
        states.append(engine.export_state())
    assert {"word_entropy", "chance", "gradient_norm"} < found[0].keys() - found[1].keys()
    assert found[1].items() <= found[0].items()
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
