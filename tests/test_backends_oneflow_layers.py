"""Layers, operations and queue of OneFlow: each test fails where a plain form is put back."""

import numpy as np
import pytest
from conftest import assert_close
from scipy.special import ndtr
from support.native import differentiate, draws, hyper, lively_state, random_batch, tiny_spec
from support.oneflow_engines import build, framework, normalized

from triptych.core.errors import NonFiniteError

RNG = np.random.default_rng(0)
POOLED = "moco_v3_resnet18"


@pytest.fixture(scope="module", autouse=True)
def flow():
    return framework()


@pytest.fixture
def layers(flow):
    from triptych.backends.oneflow import layers

    return layers


@pytest.fixture
def kernels(flow):
    from triptych.backends.oneflow import kernels

    return kernels


@pytest.fixture(params=[True, False], ids=["numpy", "oneflow"])
def either_form(layers, request, monkeypatch):
    """The layers with NumPy's kernels, as on the CPU, and with OneFlow's operations only."""
    if not request.param:
        without_numpy(layers, monkeypatch)
    return layers


def without_numpy(layers, monkeypatch):
    """Makes the layers compute as on a GPU."""
    monkeypatch.setattr(layers, "in_numpy", lambda x: False)


# ------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.02])
def test_layer_norm_takes_eps_to_the_last_bit(flow, layers, eps):
    # The kernel of the batch norm would do this fast, with eps rounded to float32.
    x = RNG.standard_normal((5, 3, 16)) * 1e-6  # the class token at the start
    value, _ = differentiate("oneflow", layers.LayerNorm(16, eps).to(flow.float64), x, probe=x)
    assert_close(value, normalized(x, -1, eps), 1e-13)


def test_layer_norm_far_from_zero(layers):
    # A variance taken as E[x^2] - E[x]^2 is 3e-4 off here.
    x = (RNG.standard_normal((64, 96)) + 30.0).astype(np.float32)
    value, _ = differentiate("oneflow", layers.LayerNorm(96, 1e-6), x, probe=x)
    assert_close(value, normalized(x, -1, 1e-6), 1e-5)


@pytest.mark.parametrize("case", ["moco_v3_vit", "moco_v3_vit_conv", POOLED, "moca_vit"])
def test_no_model_has_a_slow_layer(flow, layers, case):
    """OneFlow's own LayerNorm takes twelve times as long, its convolutions two to five times.

    ``tools/bench.py step`` measures what the models' forms give.
    """
    slow = (flow.nn.LayerNorm, flow.nn.Conv2d, flow.nn.GELU, flow.nn.BatchNorm2d)
    modules = dict(build(case=case).model.named_modules())
    found = [name for name, module in modules.items() if type(module) in slow]
    # PatchEmbed keeps its weight in a convolution that is never called.
    assert [name for name in found if not name.endswith("patch_embed.proj")] == []
    fast = {type(module) for module in modules.values()}
    assert (layers.Conv2d if case == POOLED else layers.LayerNorm) in fast


SHAPES = [(8, 6), (4, 6, 3, 5)]
AXES = {2: 0, 4: (0, 2, 3)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_takes_eps_to_the_last_bit(flow, either_form, training, shape):
    x = RNG.standard_normal(shape) * 1e-4
    axes = AXES[x.ndim]
    layer = either_form.BatchNorm(6, affine=False).to(flow.float64)
    if not training:
        layer.running_mean.copy_(flow.tensor(x.mean(axes)))
        layer.running_var.copy_(flow.tensor(x.var(axes)))
        layer.eval()
    assert_close(layer(flow.tensor(x)).numpy(), normalized(x, axes, 1e-5), 1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_running_statistics_are_those_of_pytorch(flow, either_form, shape, ranks):
    layer = either_form.BatchNorm(6).to(flow.float64)
    layer.virtual_ranks = ranks
    mean, variance = np.zeros(6), np.ones(6)
    for _ in range(5):
        x = RNG.standard_normal(shape) * 3 + 1
        layer(flow.tensor(x))
        first = x[: len(x) // ranks]
        mean = 0.9 * mean + 0.1 * first.mean(AXES[x.ndim])
        variance = 0.9 * variance + 0.1 * first.var(AXES[x.ndim], ddof=1)
    assert_close(layer.running_mean.numpy(), mean, 1e-14)
    assert_close(layer.running_var.numpy(), variance, 1e-14)
    assert layer.num_batches_tracked.dtype == flow.int64
    assert int(layer.num_batches_tracked.numpy()) == 5
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert len(layer.state_dict()) == 5


def test_batch_norm_far_from_zero(layers):
    # The kernel is 1e-4 off here.
    x = (RNG.standard_normal((64, 32)) + 20.0).astype(np.float32)
    value, _ = differentiate("oneflow", layers.BatchNorm(32), x, probe=x)
    assert_close(value, normalized(x, 0, 1e-5), 1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_maps_far_from_zero(flow, either_form, ranks):
    # The kernel is 7e-4 off here.
    x = (RNG.standard_normal((4, 6, 9, 7)) + 20.0).astype(np.float32)
    layer = either_form.BatchNorm(6)
    layer.virtual_ranks = ranks
    value, _ = differentiate("oneflow", layer, x, probe=x)
    parts = [normalized(part, (0, 2, 3), 1e-5) for part in np.split(x, ranks)]
    assert_close(value, np.concatenate(parts), 1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_map_of_one_value_is_refused(flow, layers, ranks):
    layer = layers.BatchNorm(6)
    layer.virtual_ranks = ranks
    with pytest.raises(ValueError, match="at least 2 values per channel"):
        layer(flow.ones(ranks, 6, 1, 1))


def test_batch_norm_refuses_a_batch_of_one(flow, layers):
    # The kernel gives zeros.
    layer = layers.BatchNorm(6)
    with pytest.raises(ValueError, match="at least 2 values per channel"):
        layer(flow.ones(1, 6))
    layer.eval()
    layer(flow.ones(1, 6))


# -------------------------------------------------------------------------------------- arithmetic


def test_gelu_in_numpy_is_exact_but_for_rounding(kernels):
    x = np.concatenate([np.linspace(-12, 12, 99_999), RNG.standard_normal(1001) * 100])
    x = x.astype(np.float32)
    assert len(x) > 3 * kernels.BLOCK > 0 < len(x) % kernels.BLOCK
    exact = x.astype(np.float64)
    density = np.exp(-(exact**2) / 2) / np.sqrt(2 * np.pi)
    y, dy = kernels.gelu(x, slope=True)
    assert np.abs(y - exact * ndtr(exact)).max() < 1e-6 * 100
    near = np.abs(x) < 12
    assert np.abs(y - exact * ndtr(exact))[near].max() < 1e-6
    assert np.abs(dy - ndtr(exact) - exact * density).max() < 1e-6
    again, none = kernels.gelu(x.reshape(1000, 101), slope=False)
    assert none is None and np.array_equal(again.reshape(-1), y)


def test_gelu_leaves_its_input_and_what_is_not_finite(flow, layers):
    x = np.array([np.nan, np.inf, 1e20, -1e20, 0.0], np.float32)
    before = flow.tensor(x)
    y = layers.Gelu()(before).numpy()
    assert np.array_equal(before.numpy(), x, equal_nan=True)
    assert np.isnan(y[0]) and y[1] == np.inf
    assert np.array_equal(y[2:], [np.float32(1e20), 0.0, 0.0])


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_vit_is_computed_in_numpy_in_float32_only(layers, precision, monkeypatch):
    inputs = random_batch(tiny_spec(precision)), {}, hyper()
    values, grads = build(precision).loss_and_grads(*inputs)
    without_numpy(layers, monkeypatch)
    plain_values, plain_grads = build(precision).loss_and_grads(*inputs)
    equal = all(np.array_equal(grads[n], plain_grads[n]) for n in grads)
    # Only float32 has such a form; float64 is the same computation.
    assert equal == (precision == "float64")
    assert_close(values["loss"], plain_values["loss"], 1e-6)


def test_small_rows_are_normalised_by_their_norm(flow):
    # F.normalize compares eps with the squared norm.
    from triptych.backends.oneflow import ops

    x = np.array([[3e-9, 4e-9], [3e-13, 4e-13]])
    value, (grad,) = differentiate("oneflow", ops.l2_normalize, x, probe=np.ones_like(x))
    assert_close(value, [[0.6, 0.8], [0.3, 0.4]], 1e-14)
    assert_close(grad[1], [1e12, 1e12], 1e-14)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_labels_that_oneflow_would_take_are_refused(flow, labels):
    from triptych.backends.oneflow import ops

    with pytest.raises(ValueError, match="labels: expected 0 <= label < 3"):
        ops.labels(np.array(labels), flow.zeros(2, 3))


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_nan_beside_the_label_reaches_the_loss(flow, precision, column):
    from triptych.backends.oneflow import ops

    logits = np.zeros((2, 3), precision)
    logits[0, column] = np.nan
    x = flow.tensor(logits)
    assert np.isnan(ops.cross_entropy(x, ops.labels(np.array([1, 1]), x)).numpy())


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_masked_logits_are_not_taken_for_nan(flow, precision):
    from triptych.backends.oneflow import ops

    x = flow.tensor(np.array([[-np.inf, 0.0, 0.0]], precision))
    assert_close(ops.cross_entropy(x, ops.labels(np.array([1]), x)).numpy(), np.log(2.0), 1e-5)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("where", ["student.encoder.cls_token", "student.projector.0.weight"])
def test_nan_reaches_the_loss(where, precision):
    bad = lively_state(tiny_spec())[where].copy()
    bad.flat[0] = np.nan
    with pytest.raises(NonFiniteError, match=f"first bad tensor: {where}"):
        build(precision, {where: bad}).train_step(random_batch(tiny_spec()), {}, hyper())


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(
    "where", ["student.encoder.conv1.weight", "teacher.encoder.layer4.1.bn2.bias"]
)
def test_nan_in_a_resnet_reaches_the_loss(where, precision):
    change = {where: lively_state(tiny_spec(case=POOLED))[where].copy()}
    change[where].flat[0] = np.nan
    engine = build(precision, change, POOLED)
    with pytest.raises(NonFiniteError, match=f"first bad tensor: {where}"):
        engine.train_step(random_batch(engine.spec), draws(engine.spec), hyper())


# ------------------------------------------------------------------------------------ convolutions

# (images, in, out, kernel, stride, height, width): maps so small that several images go together,
# and the last group is smaller, and maps that go one by one; sides that a stride does not divide.
CONVOLUTIONS = [
    (2, 3, 5, 3, 1, 24, 23),
    (5, 3, 5, 3, 1, 13, 14),
    (3, 4, 6, 3, 2, 9, 12),
    (2, 4, 6, 1, 1, 25, 24),
    (3, 4, 6, 1, 1, 5, 4),
    (3, 4, 6, 1, 2, 7, 4),
    (2, 3, 4, 7, 2, 15, 18),
    (2, 3, 4, 3, 2, 1, 1),
]


@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_convolution_is_oneflows_own(flow, either_form, shape):
    n, fan_in, fan_out, kernel, stride, height, width = shape
    layer = either_form.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2).to(flow.float64)
    x = RNG.standard_normal((n, fan_in, height, width))
    weight, bias = layer.weight.detach(), layer.bias.detach()

    def plain(images):
        return flow.nn.functional.conv2d(images, weight, bias, stride, kernel // 2)

    probe = RNG.standard_normal(plain(flow.tensor(x)).shape)
    want, (want_grad,) = differentiate("oneflow", plain, x, probe=probe)
    value, (grad,) = differentiate("oneflow", layer, x, probe=probe)
    assert_close(value, want, 1e-13)
    assert_close(grad, want_grad, 1e-13)
    own = layer.weight.grad.numpy().copy(), layer.bias.grad.numpy().copy()
    weight.requires_grad_(True), bias.requires_grad_(True)
    (plain(flow.tensor(x)) * flow.tensor(probe)).sum().backward()
    assert_close(own[0], weight.grad.numpy(), 1e-13)
    assert_close(own[1], bias.grad.numpy(), 1e-13)
    with flow.no_grad():
        assert_close(layer(flow.tensor(x)).numpy(), want, 1e-13)


def test_convolution_of_images_trains_its_weight(flow, either_form):
    # Images have no gradient, and none is computed.
    layer = either_form.Conv2d(3, 4, 3, 1, 1, bias=False)
    layer(flow.ones(2, 3, 5, 5)).sum().backward()
    assert_close(layer.weight.grad.numpy()[:, :, 1, 1], np.full((4, 3), 50.0), 1e-6)


def test_convolutions_are_computed_in_numpy(flow, layers, kernels, monkeypatch):
    """A convolution that went back to OneFlow's kernel would not ask ``kernels``."""
    asked = []

    def counted(name, compute):
        return lambda *x, **options: asked.append(name) or compute(*x, **options)

    for name in ("convolve", "convolve_backward"):
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    x = flow.ones(2, 4, 5, 5).requires_grad_(True)
    layers.Conv2d(4, 6, 3, 1, 1)(x).sum().backward()
    x.grad.numpy()
    assert asked == ["convolve", "convolve_backward"]


@pytest.mark.parametrize("case", ["moco_v1_resnet18", "moco_v2_bottleneck", "moco_v3_vit_conv"])
def test_a_step_is_the_same_without_numpy(layers, case, monkeypatch):
    engine, other = build(case=case), build(case=case)
    inputs = random_batch(engine.spec), draws(engine.spec), hyper()
    values, grads = engine.loss_and_grads(*inputs)
    without_numpy(layers, monkeypatch)
    plain_values, plain_grads = other.loss_and_grads(*inputs)
    assert_close(values["loss"], plain_values["loss"], 1e-12)
    norm = max(np.abs(grad).max() for grad in plain_grads.values())
    assert all(np.abs(grads[n] - plain_grads[n]).max() < 1e-10 * norm for n in grads)


# ------------------------------------------------------------------------------- queue and indices


@pytest.mark.parametrize("rows", [[0, 3], [-1, 0]])
def test_rows_that_oneflow_would_make_up_are_refused(flow, rows):
    from triptych.backends.oneflow import ops

    x = flow.ones(3, 2)
    with pytest.raises(ValueError, match="rows: expected 0 <= row < 3"):
        ops.gather_rows(x, np.array(rows))


@pytest.mark.parametrize(("copied", "late"), [(False, True), (True, False), (False, False)])
def test_keys_wait_for_the_backward_pass(flow, copied, late):
    """Without a copy of the queue, early keys change the gradient, and OneFlow does not say so."""
    from triptych.backends.oneflow import ops
    from triptych.backends.oneflow.memory import Queue

    spec = tiny_spec(case="moco_v2_bottleneck")
    memory = Queue(spec.method).to(flow.float64)
    before = RNG.standard_normal((16, 20))
    memory.queue.copy_(flow.tensor(before))
    query = flow.tensor(RNG.standard_normal((8, 16))).requires_grad_(True)
    keys, probe = flow.tensor(RNG.standard_normal((8, 16))), RNG.standard_normal((8, 20))
    logits = ops.matmul(query, memory.queue.clone() if copied else memory.queue)
    if not late:
        memory.enqueue(keys)
    (logits * flow.tensor(probe)).sum().backward()
    if late:
        memory.enqueue(keys)
    right = np.allclose(query.grad.numpy(), probe @ before.T, rtol=1e-12)
    assert right == (copied or late)
    assert np.array_equal(memory.queue.numpy()[:, :8], keys.numpy().T)
    assert np.array_equal(memory.queue.numpy()[:, 8:], before[:, 8:])


def test_the_queue_and_the_optimizer_work_in_place():
    engine = build(case="moco_v2_bottleneck")
    tensors = engine.model.state_dict()
    places = {name: tensor.numpy().ctypes.data for name, tensor in tensors.items()}
    engine.train_step(random_batch(engine.spec), draws(engine.spec), hyper())
    tensors = engine.model.state_dict()
    assert {name: tensor.numpy().ctypes.data for name, tensor in tensors.items()} == places
