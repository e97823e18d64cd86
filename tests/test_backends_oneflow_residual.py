"""A residual network as one operation in NumPy, and its parts: maps with channels last."""

import numpy as np
import pytest
from conftest import assert_close, under_test
from support.native import draws, hyper, lively_state, random_batch, tiny_spec

from triptych import backends

pytestmark = pytest.mark.skipif("oneflow" not in under_test(), reason="oneflow is not under test")

RNG = np.random.default_rng(3)
CASES = ["moco_v1_resnet18", "moco_v2_bottleneck", "moco_v3_resnet18"]


@pytest.fixture(scope="module")
def package():
    return backends.load("oneflow")


@pytest.fixture
def maps(package):
    from triptych.backends.oneflow import maps

    yield maps
    package.threads.set_count(1)


def build(package, precision="float32", case=CASES[0], **sections):
    spec = tiny_spec(precision, case, **sections)
    return package.build(spec, lively_state(spec))


def traced(engine):
    """What a step computes, and the state after it."""
    spec = engine.spec
    values, gradients = engine.trace_step(random_batch(spec), draws(spec), hyper())
    return {**values, **gradients, **engine.export_state()}


def last(x):
    """Channels last. (N, C, H, W) -> (N, H, W, C)."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def first(x):
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


# ------------------------------------------------------------------------------------ convolutions

# (images, in, out, kernel, stride, height, width): large maps in bands of rows, the last band
# smaller; small maps in groups, the last group smaller; sides that a stride does not divide.
SHAPES = [
    (2, 3, 5, 3, 1, 37, 23),
    (5, 3, 5, 3, 1, 13, 14),
    (3, 4, 6, 3, 2, 9, 12),
    (2, 3, 4, 3, 2, 65, 46),
    (2, 4, 6, 1, 1, 25, 24),
    (3, 4, 6, 1, 1, 5, 4),
    (3, 4, 6, 1, 2, 7, 4),
    (2, 3, 4, 7, 2, 15, 18),
    (1, 2, 3, 3, 1, 2, 600),
    (2, 3, 4, 3, 2, 1, 1),
    (1, 1, 1, 1, 1, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "digits"), [(np.float64, 1e-13), (np.float32, 2e-6)])
def test_a_convolution_is_that_of_kernels(package, maps, shape, kind, digits):
    n, fan_in, fan_out, kernel, stride, height, width = shape
    x = RNG.standard_normal((n, fan_in, height, width))
    weight = RNG.standard_normal((fan_out, fan_in, kernel, kernel))
    step = stride, kernel // 2
    y = package.kernels.convolve(x, weight, *step)
    grad = RNG.standard_normal(y.shape)
    of_x, of_weight = package.kernels.convolve_backward(x, weight, grad, *step, of_x=True)
    own = last(x).astype(kind), weight.astype(kind)
    found = maps.convolve(*own, *step)
    gradients = maps.convolve_backward(*own, last(grad).astype(kind), *step, of_x=True)
    none, alone = maps.convolve_backward(*own, last(grad).astype(kind), *step, of_x=False)
    assert found.dtype == gradients[0].dtype == gradients[1].dtype == kind
    assert_close(first(found), y, digits)
    assert_close(first(gradients[0]), of_x, digits)
    assert_close(gradients[1], of_weight, digits)
    assert none is None and np.array_equal(alone, gradients[1])
    assert all(each.flags.c_contiguous for each in (found, *gradients))


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (2, 2), (1, 1), (1, 4)])
def test_max_pooling_is_oneflows_own(package, maps, size):
    """With equal values, which share no gradient: all of it goes to the first."""
    import oneflow as flow

    x = np.maximum(RNG.integers(-2, 4, (2, 3, *size)), 0).astype(np.float64)
    tensor = flow.tensor(x).requires_grad_()
    y = flow.nn.functional.max_pool2d(tensor, 3, 2, 1)
    grad = RNG.standard_normal(tuple(y.shape))
    (y * flow.tensor(grad)).sum().backward()
    found = maps.max_pool(last(x))
    of_x = maps.max_pool_backward(last(x), found, last(grad))
    assert np.array_equal(first(found), y.numpy())
    # Windows of zeros differ: ReLU, which comes before, takes nothing from them.
    assert_close(first(of_x) * (x > 0), tensor.grad.numpy() * (x > 0), 1e-15)


# -------------------------------------------------------------------------------------- batch norm


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("shape", [(4, 3, 7, 5), (4, 5, 31, 33), (8, 1500, 2, 1)])
@pytest.mark.parametrize("count", [1, 3])
def test_batch_norm_is_that_of_channels(package, maps, shape, ranks, count):
    from triptych.backends.oneflow import channels

    package.threads.set_count(count)
    n, width, *_ = shape
    x, other, grad = RNG.standard_normal((3, *shape))
    affine = RNG.standard_normal((2, width))

    def parts(x):
        return x.reshape(ranks, n // ranks, width, -1)

    plain, *kept, moments, number = channels.normalize(parts(x), affine, 1e-5, keep=True)
    y = np.maximum(plain + parts(other), 0)
    before = parts(grad) * (y > 0)
    factors = np.vstack([affine[:1], kept[1]])
    wanted = channels.normalize_backward(kept[0], factors, before)

    centred, given = last(x), last(grad)
    found = maps.centre(centred, ranks, 1e-5)
    result = maps.scale(centred, found.inverse, tuple(affine), other=last(other))
    assert_close(
        maps.scale(centred, found.inverse, tuple(affine), relu=False),
        last(plain.reshape(shape)),
        1e-13,
    )
    assert_close(result, last(y.reshape(shape)), 1e-13)
    assert_close(found.moments, moments, 1e-13)
    assert found.number == number
    own = maps.normalize_backward(centred, found.inverse, affine[0], result, given)
    assert_close(centred, last(wanted[0].reshape(shape)), 1e-12)
    assert_close(given, last(before.reshape(shape)), 1e-13)
    assert_close(own[0], wanted[1], 1e-12)
    assert_close(own[1], wanted[2], 1e-12)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_statistics_of_many_values_keep_their_digits(maps, mean):
    """The sum of 100,000 values of float32, one after the other, would lose two digits."""
    x = (RNG.standard_normal((8, 112, 112, 3)) + mean).astype(np.float32)
    exact = x.astype(np.float64).reshape(-1, 3)
    found = maps.centre(x, 1, 0.0)
    assert_close(found.moments[0], exact.mean(0), 1e-6 if mean else 1e-4)
    assert_close(found.moments[1], exact.var(0, ddof=1), 5e-7)
    assert_close(found.inverse[0], exact.std(0) ** -1.0, 5e-7)


def test_blocks_are_the_same_in_any_number_of_threads(package, maps):
    shape = 4, 31, 33, 5
    x, grad = RNG.standard_normal((2, *shape)).astype(np.float32)
    affine, results = (np.ones(5, np.float32), np.zeros(5, np.float32)), []
    for count in (1, 3):
        package.threads.set_count(count)
        centred, given = x.copy(), grad.copy()
        found = maps.centre(centred, 2, 1e-5)
        y = maps.scale(centred, found.inverse, affine)
        own = maps.normalize_backward(centred, found.inverse, affine[0], y, given)
        results.append([*found, y, centred, given, *own])
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


# ----------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_network_is_that_of_its_modules(package, monkeypatch, case, ranks):
    """In float64, which shows more digits: the network is one operation in float32 alone."""
    from triptych.backends.oneflow import residual

    calls, whole = [], residual.pooled
    monkeypatch.setattr(residual, "pooled", lambda *x: calls.append(x) or whole(*x))
    sections = {"batch_norm": {"virtual_ranks": ranks}}
    plain = traced(build(package, "float64", case, **sections))
    assert not calls
    in_float32 = traced(build(package, case=case, **sections))
    assert calls
    monkeypatch.setattr(residual, "serve", lambda *_: True)
    found = traced(build(package, "float64", case, **sections))
    assert plain.keys() == found.keys() == in_float32.keys()
    for name, value in plain.items():
        size = max(np.abs(value).max(), 1e-2)
        assert np.abs(found[name] - value).max() < 1e-10 * size, name
    assert_close(in_float32["loss"], plain["loss"], 1e-5)
    for name in (name for name in plain if "running_" in name):
        assert_close(in_float32[name], plain[name], 1e-5, name)


def test_a_network_differentiates_images_if_they_want_it(package):
    import oneflow as flow

    encoder = build(package, case="moco_v3_resnet18").model.student.encoder
    images = RNG.standard_normal((8, 3, 40, 56)).astype(np.float32)
    gradients = []
    for of_x, of_weights in ((True, True), (True, False), (False, True)):
        encoder.requires_grad_(of_weights)
        for parameter in encoder.parameters():
            parameter.grad.zero_()
        x = flow.tensor(images).requires_grad_(of_x)
        (encoder(x) ** 2).sum().backward()
        own = [parameter.grad.numpy().copy() for parameter in encoder.parameters()]
        gradients.append((x.grad.numpy().copy() if of_x else None, own))
    (x, own), (x_alone, none), (nothing, own_alone) = gradients
    assert np.abs(x).max() > 0 and np.array_equal(x, x_alone) and nothing is None
    assert all(np.array_equal(a, b) for a, b in zip(own, own_alone, strict=True))
    assert all(np.abs(gradient).max() > 0 for gradient in own)
    assert not any(gradient.any() for gradient in none)
    # Image gradients are those of the modules in float64.
    exact = build(package, "float64", "moco_v3_resnet18").model.student.encoder
    x64 = flow.tensor(images.astype(np.float64)).requires_grad_()
    (exact(x64) ** 2).sum().backward()
    assert_close(x, x64.grad.numpy(), 1e-4)


def test_norms_in_evaluation_take_the_modules(package, monkeypatch):
    import oneflow as flow

    from triptych.backends.oneflow import residual

    monkeypatch.setattr(residual, "pooled", None)  # nothing may call it
    encoder = build(package).model.student.encoder
    images = flow.ones(2, 3, 8, 12)
    encoder.layer3[0].bn1.eval()
    encoder(images)
    encoder.eval()
    encoder(images)


def test_running_statistics_stay_if_they_are_told_to(package):
    import oneflow as flow

    encoder = build(package, batch_norm={"virtual_ranks": 1}).model.student.encoder
    norm, images = encoder.layer2[0].downsample[1], flow.tensor(RNG.standard_normal((4, 3, 8, 12)))
    before = norm.running_mean.numpy().copy(), int(norm.num_batches_tracked.numpy())
    package.layers.set_tracking(encoder, False)
    encoder(images.to(flow.float32))
    assert np.array_equal(norm.running_mean.numpy(), before[0])
    package.layers.set_tracking(encoder, True)
    encoder(images.to(flow.float32))
    assert not np.array_equal(norm.running_mean.numpy(), before[0])
    assert int(norm.num_batches_tracked.numpy()) == before[1] + 1


def test_one_value_of_a_channel_has_no_variance(package):
    import oneflow as flow

    encoder = build(package, batch_norm={"virtual_ranks": 2}).model.student.encoder
    with pytest.raises(ValueError, match="expected at least 2 values per channel, got 1"):
        encoder(flow.ones(2, 3, 8, 8))  # the last maps have one position


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error")
def test_non_finite_images_show_in_the_result_and_in_the_gradients(package, case, bad):
    import oneflow as flow

    engine = build(package, case=case)
    encoder, images = engine.model.student.encoder, random_batch(engine.spec).views[0].copy()
    images[0, 0, 0, 0] = bad
    y = encoder(flow.tensor(images))
    assert np.isnan(y.numpy()).any()
    y.sum().backward()
    assert np.isnan(encoder.layer1[0].conv1.weight.grad.numpy()).any()


def test_a_network_frees_its_activations_while_the_loss_lives(package, monkeypatch):
    import oneflow as flow

    from triptych.backends.oneflow import residual

    kept, whole = [], residual._recorded

    def recorded(*args, **options):
        y, backward = whole(*args, **options)
        kept.append(backward)
        return y, lambda grad: backward(grad)

    monkeypatch.setattr(residual, "_recorded", recorded)
    loss = build(package).model.student.encoder(flow.ones(2, 3, 8, 12)).sum()
    (backward,) = kept
    cells = [cell.cell_contents for cell in backward.__closure__]
    (held,) = [value for value in cells if isinstance(value, list)]
    assert len(held) == 9  # the stem and eight blocks
    loss.backward()
    assert held == []
