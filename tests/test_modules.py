"""Every module and the whole model of every backend against the float64 NumPy reference."""

import numpy as np
import pytest
from autograd import elementwise_grad
from conftest import TOLERANCE, assert_close, relative_error
from native import differentiate, hyper, lively_state, random_batch, tiny_spec

from triptych.core import reference
from triptych.core.parity.compare import certain, noise_names
from triptych.core.reference import encoders, layers
from triptych.core.reference.layers import TRAINING

SPEC = tiny_spec()
RNG = np.random.default_rng(1)
TOKENS = (8, 7, SPEC.model.width)
B = "student.encoder.blocks.0"


def norm(values, x):
    return layers.layer_norm(values, "student.encoder.norm", x, SPEC.model.layer_norm_eps)


def attention(values, x):
    return encoders.attention(values, f"{B}.attn", x, SPEC.model.heads)


def feed_forward(values, x):
    hidden = layers.gelu(layers.linear(values, f"{B}.mlp.fc1", x))
    return layers.linear(values, f"{B}.mlp.fc2", hidden)


def block(values, x):
    return encoders.block(values, B, x, SPEC.model)


def class_token(values, x):
    return encoders.vit(values, "student.encoder", x, SPEC.model)["final"][:, 0]


def batch_norm(values, x):
    return layers.batch_norm(values, "student.projector.1", x, TRAINING)


def projector(values, x):
    return layers.mlp(values, "student.projector", x, 3, TRAINING)


def predictor(values, x):
    return layers.mlp(values, "student.predictor", x, 2, TRAINING)


MODULES = {
    "layer_norm": ("encoder.norm", norm, TOKENS),
    "layer_norm_far": ("encoder.norm", norm, TOKENS),
    "attention": ("encoder.blocks.0.attn", attention, TOKENS),
    "mlp": ("encoder.blocks.0.mlp", feed_forward, TOKENS),
    "block": ("encoder.blocks.0", block, TOKENS),
    "encoder": ("encoder", class_token, (8, 3, 8, 12)),
    "batch_norm": ("projector.1", batch_norm, (8, SPEC.method.hidden_dim)),
    "projector": ("projector", projector, (8, SPEC.model.width)),
    "predictor": ("predictor", predictor, (8, SPEC.method.output_dim)),
}


def submodule(module, path):
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


@pytest.fixture(scope="module", params=["float64", "float32"])
def engine(backend, request):
    spec = tiny_spec(request.param)
    return backend.build(spec, lively_state(spec))


@pytest.mark.parametrize("case", MODULES)
def test_module(engine, backend_name, case):
    path, function, shape = MODULES[case]
    precision = engine.context.precision
    x = RNG.standard_normal(shape).astype(precision)
    if case == "layer_norm_far":
        # A mean far above the spread: forms built on E[x^2] - E[x]^2 lose their digits here.
        x = x + np.array(20.0, precision)
    values = {n: a.astype(np.float64) for n, a in engine.export_state().items()}
    want = function(dict(values), x.astype(np.float64))
    probe = RNG.standard_normal(want.shape).astype(precision)
    want_grad = elementwise_grad(lambda a: np.sum(function(dict(values), a) * probe))(
        x.astype(np.float64)
    )
    value, (grad,) = differentiate(
        backend_name, submodule(engine.model.student, path), x, probe=probe
    )
    # The error of a norm's input at mean 20 is that of the input's own last bit.
    allowed = TOLERANCE[precision]["op"] * (20 if case == "layer_norm_far" else 1)
    assert value.dtype == precision
    assert_close(value, want, allowed, case)
    assert_close(grad, want_grad, allowed, f"gradient of {case}")


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_loss_features_and_gradients(backend, precision):
    spec = tiny_spec(precision)
    state = lively_state(spec)
    engines = backend.build(spec, state), reference.build(spec, state)
    batch = random_batch(spec)
    (values, grads), (want, want_grads) = (e.loss_and_grads(batch, {}, hyper()) for e in engines)
    assert set(values) == set(want)
    assert set(grads) == set(want_grads)
    features = {"float64": TOLERANCE["float64"]["features"], "float32": 1e-4}[precision]
    for name in want:
        assert_close(values[name], want[name], features, name)
    noise = noise_names({f"grad/{n}/step0": g for n, g in want_grads.items()}, precision)
    assert "student.encoder.norm.bias" in noise
    for name in set(want_grads) - noise:
        error = relative_error(
            certain(f"grad/{name}/step0", grads[name]),
            certain(f"grad/{name}/step0", want_grads[name]),
        )
        assert error < {"float64": 1e-10, "float32": 1e-3}[precision], name


def test_state_after_three_steps(backend):
    spec = tiny_spec(optim={"clip_norm": 1.0})
    state = lively_state(spec)
    engines = backend.build(spec, state), reference.build(spec, state)
    for step in range(3):
        for engine in engines:
            engine.train_step(random_batch(spec, step), {}, hyper(step))
    # What matters is what moved: a state that stayed at its start would be close as well.
    got, want = (e.export_state() for e in engines)
    assert set(got) == set(want)
    for name, value in want.items():
        start = state.get(name, np.zeros_like(value))
        moved = np.abs(value - start).max()
        if moved > 1e-4:
            assert np.abs(got[name] - value).max() / moved < 1e-8, name
    assert int(got["optimizer.step"]) == 3
    assert int(got["student.projector.1.num_batches_tracked"]) == 6
    assert int(got["teacher.projector.1.num_batches_tracked"]) == 6


def test_embedding(backend):
    spec = tiny_spec()
    state = lively_state(spec)
    images = random_batch(spec).views[0]
    for branch in ("student", "teacher"):
        for tokens in ("cls", "mean", "all"):
            options = {"branch": branch, "layers": (0,), "tokens": tokens, "projection": True}
            got, want = (
                package.build(spec, state).embed(images, **options)
                for package in (backend, reference)
            )
            assert set(got) == {"final", "layer0", "projection"}
            for name in want:
                assert_close(got[name], want[name], 1e-12, f"{branch} {tokens} {name}")


def test_embedding_leaves_the_state_alone(backend):
    spec = tiny_spec()
    engine = backend.build(spec, lively_state(spec))
    before = engine.export_state()
    engine.embed(random_batch(spec).views[0], projection=True)
    after = engine.export_state()
    assert all(np.array_equal(before[n], after[n]) for n in before)
    engine.train_step(random_batch(spec), {}, hyper())
    statistics = "student.projector.1.running_mean"
    assert not np.array_equal(engine.export_state()[statistics], after[statistics])


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_state_moves_to_a_fresh_engine_and_goes_on_bit_for_bit(backend, precision):
    spec = tiny_spec(precision)
    first = backend.build(spec, lively_state(spec))
    for step in range(3):
        first.train_step(random_batch(spec, step), {}, hyper(step))
    state = first.export_state()
    second = backend.build(spec, lively_state(spec))
    second.import_state(state)
    for engine in (first, second):
        for step in range(3, 6):
            engine.train_step(random_batch(spec, step), {}, hyper(step))
    one, two = first.export_state(), second.export_state()
    assert all(np.array_equal(one[n], two[n]) for n in one)
    assert not np.array_equal(one["student.encoder.cls_token"], state["student.encoder.cls_token"])


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

    spec = tiny_spec("float16")
    with pytest.raises(UserError, match=f"precision: {backend_name} has no float16"):
        backend.build(spec, lively_state(spec))
    spec = tiny_spec().model_copy(update={"device": "cuda:7"})
    with pytest.raises(UserError, match=f"device: 'cuda:7', but {backend_name} sees"):
        backend.build(spec, lively_state(spec))
