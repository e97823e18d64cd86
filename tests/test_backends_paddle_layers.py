"""Layers, operations and queue of Paddle: each test fails where a plain form is put back."""

import numpy as np
import pytest
from conftest import assert_close
from support.native import differentiate, draws, hyper, lively_state, random_batch, tiny_spec
from support.paddle_engines import build, framework, normalized

from triptych.core.errors import NonFiniteError

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def paddle():
    return framework()


@pytest.fixture
def layers(paddle):
    """The backend's layers, float64 while the test runs."""
    from triptych.backends.paddle import layers

    paddle.set_default_dtype("float64")
    yield layers
    paddle.set_default_dtype("float32")


# ------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 0.02])
def test_layer_norm_takes_epsilon_to_the_last_bit(layers, epsilon):
    # Paddle's own rounds it to float32 and takes none above 1e-3.
    x = RNG.standard_normal((5, 3, 16)) * 1e-6  # the class token at the start
    layer = layers.LayerNorm(16, epsilon)
    value, _ = differentiate("paddle", layer, x, probe=np.ones_like(x))
    assert_close(value, normalized(x, -1, epsilon), 1e-13)


@pytest.mark.parametrize("name", ["layer_norm", "gelu"])
def test_forms_of_float32_are_those_of_float64(paddle, name):
    """In float64 these are Paddle's own function, and layer norm in the form of batch norm."""
    from triptych.backends.paddle import layers

    x, probe = RNG.standard_normal((2, 3, 5, 16)) * 3 + 1
    weights = RNG.standard_normal((2, 16)) + 1
    found = []
    for precision in ("float32", "float64"):
        paddle.set_default_dtype(precision)
        layer = layers.LayerNorm(16) if name == "layer_norm" else layers.Gelu()
        paddle.set_default_dtype("float32")
        for parameter, values in zip(layer.parameters(), weights, strict=False):
            parameter.set_value(values.astype(precision))
        value, (grad,) = differentiate(
            "paddle", layer, x.astype(precision), probe=probe.astype(precision)
        )
        assert {str(a.dtype) for a in (value, grad)} == {precision}
        found.append([value, grad, *(p.grad.numpy() for p in layer.parameters())])
    assert len(found[0]) == (4 if name == "layer_norm" else 2)
    for got, want in zip(*found, strict=True):
        assert not np.array_equal(got, want)
        assert_close(got, want, 1e-6)


def test_forms_of_float32_are_used_where_they_are_faster(paddle, monkeypatch):
    """A teacher's, too. Paddle 2.6 lacks the gradient that layer norm needs for it."""
    from triptych.backends.paddle import layers

    faster = {"gelu", "layer_norm"} if layers.GRADIENT_KERNELS else {"gelu"}
    calls = []
    for name in ("gelu", "layer_norm"):
        kernel = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *x, n=name, k=kernel: calls.append(n) or k(*x))
    spec = tiny_spec("float32")
    for precision, want in (("float64", set()), ("float32", faster)):
        engine = build(precision)
        engine.loss_and_grads(random_batch(spec), draws(spec), hyper())
        assert set(calls) == want
    assert calls.count("gelu") == 4 * spec.model.depth
    norms = 4 * (2 * spec.model.depth + 1)
    assert calls.count("layer_norm") == (norms if layers.GRADIENT_KERNELS else 0)


def test_which_forms_a_version_of_paddle_has(paddle):
    from triptych.backends.paddle import kernels

    assert kernels.GRADIENT_KERNELS == (not paddle.__version__.startswith("2."))


def test_gelu_of_values_in_any_order_of_memory(paddle):
    """What oneDNN has marked would crash the process in the next operation."""
    from triptych.backends.paddle.kernels import gelu

    values = paddle.to_tensor(RNG.standard_normal((4, 3, 6)).astype(np.float32))
    for view in (values.transpose([2, 0, 1]), values[:, 1:], values[1:, :, ::2], values[0, 0]):
        found = []
        for function in (gelu, paddle.nn.functional.gelu):
            x = view.detach()
            x.stop_gradient = False
            y = function(x)
            rows = y.reshape([-1, x.shape[-1]])
            product = paddle.matmul(rows, rows, transpose_y=True)
            found += [product, *paddle.grad([product.sum()], [x])]
        assert_close(found[0].numpy(), found[2].numpy(), 1e-6)
        assert_close(found[1].numpy(), found[3].numpy(), 1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_takes_epsilon_to_the_last_bit(layers, paddle, training):
    x = RNG.standard_normal((8, 6)) * 1e-4
    layer = layers.BatchNorm(6, affine=False)
    if not training:
        layer.running_mean.set_value(x.mean(0))
        layer.running_var.set_value(x.var(0))
        layer.eval()
    assert_close(layer(paddle.to_tensor(x)).numpy(), normalized(x, 0, 1e-5), 1e-13)


@pytest.mark.parametrize("shape", [(8, 6), (4, 6, 3, 5)])
def test_running_statistics_are_those_of_pytorch(layers, paddle, shape):
    layer = layers.BatchNorm(6)
    mean, variance = np.zeros(6), np.ones(6)
    for _ in range(5):
        x = RNG.standard_normal(shape) * 3 + 1
        layer(paddle.to_tensor(x))
        axes = tuple(i for i in range(x.ndim) if i != 1)
        mean = 0.9 * mean + 0.1 * x.mean(axes)
        variance = 0.9 * variance + 0.1 * x.var(axes, ddof=1)
    assert_close(layer.running_mean.numpy(), mean, 1e-14)
    assert_close(layer.running_var.numpy(), variance, 1e-14)
    assert layer.num_batches_tracked.dtype == paddle.int64
    assert int(layer.num_batches_tracked) == 5
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert len(layer.state_dict()) == 5


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_running_variance_is_right_whichever_kernel_ran(layers, paddle, monkeypatch, scale):
    """cuDNN leaves the unbiased variance in its running buffer, the CPU's kernel the biased one."""
    kernel = paddle._C_ops.batch_norm

    def as_cudnn(x, mean, variance, *options):
        found = kernel(x, mean, variance, *options)
        variance.scale_(len(x) / (len(x) - 1))
        return found

    x = RNG.standard_normal((8, 6)) * scale
    for one in (kernel, as_cudnn):
        monkeypatch.setattr(paddle._C_ops, "batch_norm", one)
        layer = layers.BatchNorm(6, momentum=1.0)
        layer(paddle.to_tensor(x))
        assert_close(layer.running_var.numpy(), x.var(0, ddof=1), 1e-12 / scale)


def test_half_precision_keeps_its_statistics_and_its_epsilon_in_float32(layers, paddle):
    """As float64, bfloat16 activations would be multiplied by a factor that they cannot hold."""
    for half in (paddle.bfloat16, paddle.float16):
        x = paddle.zeros([2], half)
        assert layers.exact_epsilon(1e-5, x) == (1.0, 1e-5)
        assert layers.statistics_dtype(x) == paddle.float32
    assert layers.statistics_dtype(paddle.zeros([2], "float64")) == paddle.float64


def test_batch_norm_refuses_a_batch_of_one(layers, paddle):
    layer = layers.BatchNorm(6)
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer(paddle.ones([1, 6]))
    layer.eval()
    layer(paddle.ones([1, 6]))


# -------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("margin", [1.0, 59.9, 60.1, 64.0, 65.0, 80.0, 1000.0])
def test_cross_entropy_beyond_a_margin_of_64(paddle, margin, precision):
    from triptych.backends.paddle import ops

    logits = np.zeros((2, 4), precision)
    logits[0, 1] = margin
    x = paddle.to_tensor(logits, stop_gradient=False)
    loss = ops.cross_entropy(x, ops.labels(np.zeros(2, np.int64), x))
    rest = np.log(np.exp(-margin) * 3 + 1.0)
    assert_close(
        loss.numpy(),
        (margin + rest + np.log(4.0)) / 2,
        1e-15 if x.dtype == paddle.float64 else 1e-6,
    )


def test_cross_entropy_passes_nan_on(paddle):
    from triptych.backends.paddle import ops

    x = paddle.to_tensor([[0.0, float("nan")], [1.0, 2.0]])
    # Of long rows that are nan throughout, Paddle 2.6 finds a maximum of -inf.
    for bad in (x, paddle.full([64, 64], float("nan"))):
        labels = ops.labels(np.zeros(len(bad), np.int64), bad)
        assert np.isnan(ops.cross_entropy(bad, labels).numpy())


@pytest.mark.parametrize(
    "labels",
    [np.array([0.0, 1.7]), np.array([0, 3]), np.array([-1, 0]), np.array([0, 1], np.int32)],
)
def test_labels_that_paddle_would_take_are_refused(paddle, labels):
    from triptych.backends.paddle import ops

    with pytest.raises(ValueError, match="labels: expected int64, 0 <= label < 3"):
        ops.labels(labels, paddle.zeros([2, 3]))


def test_relu_works_in_place_and_keeps_nan(layers, paddle):
    x = np.array([[np.nan, 2.0, 0.0, -1.0, np.inf, 5e-324]])
    value, (grad,) = differentiate(
        "paddle", lambda x: layers.relu_(x * 1.0), x, probe=np.full_like(x, 3.0)
    )
    np.testing.assert_array_equal(value, np.maximum(x, 0.0))
    np.testing.assert_array_equal(grad[0, 1:], [3.0, 0.0, 0.0, 3.0, 3.0])
    tensor = paddle.to_tensor(x)
    before = tensor.data_ptr()
    assert layers.relu_(tensor).data_ptr() == before


@pytest.mark.parametrize(("stride", "size", "fast"), [(1, 3, 1), (2, 5, 1), (2, 6, 1), (1, 9, 0)])
def test_convolution_of_single_positions(layers, paddle, monkeypatch, stride, size, fast):
    calls, mix = [], layers.mix_channels
    monkeypatch.setattr(layers, "mix_channels", lambda *given: calls.append(1) or mix(*given))
    layer = layers.Conv2D(96, 80, 1, stride, bias=False)
    layer.weight.set_value(RNG.standard_normal(layer.weight.shape))
    x = RNG.standard_normal((2, 96, size, size))
    probe = RNG.standard_normal(layer(paddle.to_tensor(x)).shape)
    value, (grad,) = differentiate("paddle", layer, x, probe=probe)
    gradient = layer.weight.grad.numpy().copy()
    layer.clear_gradients()
    plain = differentiate("paddle", super(type(layer), layer).forward, x, probe=probe)
    assert len(calls) == 2 * fast
    assert_close(value, plain[0], 1e-14)
    assert_close(grad, plain[1][0], 1e-14)
    assert_close(gradient, layer.weight.grad.numpy(), 1e-14)


def test_max_pool_is_the_plain_one(layers, paddle):
    x, probe = RNG.standard_normal((2, 3, 7, 10)), RNG.standard_normal((2, 3, 4, 5))
    (a, (da,)), (b, (db,)) = (
        differentiate("paddle", f, x, probe=probe)
        for f in (layers.max_pool, lambda x: paddle.nn.functional.max_pool2d(x, 3, 2, 1))
    )
    assert np.array_equal(a, b) and np.array_equal(da, db)


def test_max_pool_of_nan(layers, paddle):
    # With return_mask: -3e38, and a gradient written in front of the tensor.
    x = np.ones((2, 3, 7, 10))
    x[0, 0] = np.nan
    value, (grad,) = differentiate("paddle", layers.max_pool, x, probe=np.ones((2, 3, 4, 5)))
    assert np.isnan(value[0, 0]).all() and (value.ravel()[20:] == 1).all()
    assert (grad[0, 0] == 0).all() and grad.sum() == 100


@pytest.mark.parametrize(
    ("case", "where"),
    [
        ("moco_v3_vit", "student.encoder.cls_token"),
        ("moco_v3_vit", "student.projector.0.weight"),
        ("moco_v3_vit_conv", "student.encoder.patch_embed.proj.0.weight"),
        ("moco_v3_resnet18", "student.encoder.conv1.weight"),
        ("moco_v2_bottleneck", "student.encoder.layer1.0.conv3.weight"),
    ],
)
def test_nan_reaches_the_loss(case, where):
    # F.relu makes 0 of nan: the run would go on, at the chance level for ever.
    spec = tiny_spec(case=case)
    bad = lively_state(spec)[where].copy()
    bad.flat[0] = np.nan
    with pytest.raises(NonFiniteError, match=f"first bad tensor: {where}"):
        build(change={where: bad}, case=case).train_step(random_batch(spec), draws(spec), hyper())


def test_splitting_heads_and_merging_them(paddle):
    from triptych.backends.paddle import vit

    x = RNG.standard_normal((2, 5, 3 * 8))
    probe = RNG.standard_normal((3, 2, 4, 5, 2))

    def gathered(x):
        return paddle.stack(vit._SplitHeads.apply(x, 3, 4))

    def transposed(x):
        return x.reshape([2, 5, 3, 4, 2]).transpose([2, 0, 3, 1, 4])

    (a, (da,)), (b, (db,)) = (
        differentiate("paddle", f, x, probe=probe) for f in (gathered, transposed)
    )
    assert np.array_equal(a, b) and np.array_equal(da, db)
    value, (grad,) = differentiate("paddle", vit._MergeHeads.apply, a[0], probe=x[:, :, :8])
    assert np.array_equal(value, a[0].transpose(0, 2, 1, 3).reshape(2, 5, 8))
    assert np.array_equal(grad, x[:, :, :8].reshape(2, 5, 4, 2).transpose(0, 2, 1, 3))


@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize(("shift", "softmax"), [(0.0, False), (4.0, True), (-4.0, True)])
def test_attention_of_float32_is_that_of_float64(paddle, monkeypatch, queries, shift, softmax):
    """Large scores overflow without softmax, and with small ones nothing is left to divide by."""
    from triptych.backends.paddle import vit

    shapes = [(2, 3, queries, 64), (2, 3, 7, 64), (2, 3, 7, 64)]
    query, key, value = (RNG.standard_normal(shape) for shape in shapes)
    query, key = query + abs(shift), key + shift  # scores are about 8 * 16 or -8 * 16
    probe = RNG.standard_normal((2, queries, 3 * 64))
    calls, kernel = [], vit.F.softmax
    monkeypatch.setattr(vit.F, "softmax", lambda x: calls.append(x.dtype) or kernel(x))
    found = []
    for precision in ("float64", "float32"):
        parts = (x.astype(precision) for x in (query, key, value))
        mixed, grads = differentiate(
            "paddle", vit._attend_merged, *parts, probe=probe.astype(precision)
        )
        found.append([mixed, *grads])
        assert {str(x.dtype) for x in found[-1]} == {precision}
    assert calls == [paddle.float64, paddle.float32][: 1 + softmax]
    for want, got in zip(*found, strict=True):
        assert_close(got, want, 1e-4 if softmax else 2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_attention_passes_nan_on(paddle, bad):
    from triptych.backends.paddle import vit

    x = paddle.ones([1, 2, 5, 8])
    x[0, 1, 2, 3] = bad
    mixed = vit._attend_merged(x, x, x)
    assert not np.isfinite(mixed.numpy()[0, :, 8:]).any()
    assert np.isfinite(mixed.numpy()[0, :, :8]).all()


@pytest.mark.parametrize(
    "case",
    ["moco_v3_vit", "moco_v3_vit_conv", pytest.param("moco_v3_resnet18", marks=pytest.mark.soak)],
)
def test_the_plain_forms_compute_the_same(paddle, case):
    """Those of a GPU and of an exported graph, where the fast forms of the CPU are not used."""
    if case == "moco_v3_vit_conv" and paddle.__version__.startswith("2."):
        pytest.skip("Paddle 2.6 cannot convert our batch norm in training; exports have none")
    engine = build("float32", case=case)
    encoder = engine.model.student.encoder
    images = paddle.to_tensor(random_batch(engine.spec).views[0])
    want = encoder(images)
    want.sum().backward()
    grads = {n: p.grad.numpy() for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.clear_gradients()
    got = paddle.jit.to_static(encoder, full_graph=True)(images)
    got.sum().backward()
    assert_close(got.numpy(), want.numpy(), 1e-5)
    assert len(grads) > 20
    for name, parameter in encoder.named_parameters():
        if name in grads and "qkv.bias" not in name:
            assert_close(parameter.grad.numpy(), grads[name], 1e-4, name)


def test_rows_beyond_the_end_are_refused(paddle):
    from triptych.backends.paddle import ops

    with pytest.raises(IndexError):
        ops.gather_rows(paddle.ones([3, 2]), np.array([0, 3]))


def test_keys_enter_the_queue_where_it_is():
    spec = tiny_spec(case="moco_v2_bottleneck")
    memory = build(case="moco_v2_bottleneck").model.memory
    queue, address = memory.queue, memory.queue.data_ptr()
    memory.enqueue(queue[:, :8].T * 2.0)
    assert memory.queue is queue and queue.data_ptr() == address
    start = lively_state(spec)["memory.queue"]
    np.testing.assert_array_equal(queue.numpy()[:, :8], 2 * start[:, :8])
    np.testing.assert_array_equal(queue.numpy()[:, 8:], start[:, 8:])
