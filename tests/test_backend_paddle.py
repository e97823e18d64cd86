"""What is wrong or slow in Paddle itself: each test fails where its plain form is put back."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_close, relative_error, requested
from native import differentiate, hyper, lively_state, random_batch, tiny_spec

from triptych import backends
from triptych.core.errors import NonFiniteError, UserError

RNG = np.random.default_rng(0)
ROOT = Path(__file__).resolve().parent.parent
SQUARE = "student.encoder.blocks.0.attn.proj.weight"


@pytest.fixture(scope="module", autouse=True)
def paddle():
    """The framework, loaded by the backend; missing although requested, it fails."""
    names = requested()
    if "paddle" not in (backends.installed() if names is None else names):
        pytest.skip("paddle is not installed, or not requested by TRIPTYCH_BACKENDS")
    backends.load("paddle")
    import paddle

    return paddle


@pytest.fixture
def layers(paddle):
    """The backend's layers, float64 while the test runs."""
    from triptych.backends.paddle import layers

    paddle.set_default_dtype("float64")
    yield layers
    paddle.set_default_dtype("float32")


def build(precision="float64", change=None, **sections):
    spec = tiny_spec(precision, **sections)
    return backends.load("paddle").build(spec, {**lively_state(spec), **(change or {})})


def normalized(x, axis, epsilon):
    x = x.astype(np.longdouble)
    centred = x - x.mean(axis, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis, keepdims=True) + np.longdouble(epsilon))


# ------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 0.02])
def test_layer_norm_takes_epsilon_to_the_last_bit(layers, epsilon):
    # Paddle's own rounds it to float32 and takes none above 1e-3.
    x = RNG.standard_normal((5, 3, 16)) * 1e-6  # the class token at the start
    layer = layers.LayerNorm(16, epsilon)
    value, _ = differentiate("paddle", layer, x, probe=np.ones_like(x))
    assert_close(value, normalized(x, -1, epsilon), 1e-13)


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
    assert np.isnan(ops.cross_entropy(x, ops.labels(np.zeros(2, np.int64), x)).numpy())


@pytest.mark.parametrize(
    "labels",
    [np.array([0.0, 1.7]), np.array([0, 3]), np.array([-1, 0]), np.array([0, 1], np.int32)],
)
def test_labels_that_paddle_would_take_are_refused(paddle, labels):
    from triptych.backends.paddle import ops

    with pytest.raises(ValueError, match="labels: expected int64, 0 <= label < 3"):
        ops.labels(labels, paddle.zeros([2, 3]))


@pytest.mark.parametrize("where", ["student.encoder.cls_token", "student.projector.0.weight"])
def test_nan_reaches_the_loss(where):
    # F.relu makes 0 of nan: the run would go on, at the chance level for ever.
    bad = lively_state(tiny_spec())[where].copy()
    bad.flat[0] = np.nan
    with pytest.raises(NonFiniteError, match=f"first bad tensor: {where}"):
        build(change={where: bad}).train_step(random_batch(tiny_spec()), {}, hyper())


def test_norm_of_a_large_gradient(paddle):
    # paddle.linalg.norm and paddle.dot add up one after the other and lose 0.2 % here, in float32.
    from triptych.backends.paddle.optim import AdamW

    gradient = RNG.standard_normal(1 << 22).astype(np.float32)
    parameter = paddle.zeros(gradient.shape)
    parameter.stop_gradient = False
    (parameter * paddle.to_tensor(gradient)).sum().backward()
    norm = AdamW({"a": parameter}, tiny_spec().optim).gradient_norm().numpy()
    assert_close(norm, np.linalg.norm(gradient.astype(np.float64)), 1e-6)


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


def test_the_plain_forms_compute_the_same(paddle):
    """Those of a GPU and of an exported graph, where the fast forms of the CPU are not used."""
    engine = build("float32")
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


# ------------------------------------------------------------------------ optimizer, teacher, state


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_adamw_is_exact_in_float64(paddle, eps):
    from triptych.backends.paddle.optim import AdamW

    start = RNG.standard_normal((4, 3))
    parameter = paddle.to_tensor(start, stop_gradient=False)
    spec = tiny_spec(optim={"eps": eps, "betas": [0.87, 0.997]}).optim
    optimizer = AdamW({"a": parameter}, spec)
    p, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for step in range(1, 51):
        gradient = RNG.standard_normal(start.shape) * [1.0, 1e-6, 0.0]
        h = hyper(step - 1, lr=0.01 * step, weight_decay=0.3 / step)
        optimizer.zero_grad()
        (parameter * paddle.to_tensor(gradient)).sum().backward()
        optimizer.step(h)
        m = 0.87 * m + (1 - 0.87) * gradient
        v = 0.997 * v + (1 - 0.997) * gradient**2
        p = p * (1 - h.lr * h.weight_decay)
        p = p - h.lr / (1 - 0.87**step) * m / (np.sqrt(v) / np.sqrt(1 - 0.997**step) + eps)
    assert_close(parameter.numpy(), p, 1e-14)
    assert optimizer.count == 50


def test_optimizer_and_teacher_work_in_place():
    engine = build()
    before = dict(engine.model.named_parameters())
    engine.train_step(random_batch(engine.spec), {}, hyper())
    after = dict(engine.model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    start = lively_state(engine.spec)
    moved = [n for n, a in engine.export_state().items() if n in start and (a != start[n]).any()]
    fixed = set(start) - set(moved)
    assert fixed == {
        n for n in start if "_embed" in n and not n.startswith("teacher.encoder.patch")
    }


def test_what_student_and_teacher_share_stays_equal_to_the_last_bit():
    spec = tiny_spec()
    name = "encoder.patch_embed.proj.weight"
    shared = lively_state(spec)[f"student.{name}"]
    engine = build("float32", {f"teacher.{name}": shared})
    for step in range(5):
        engine.train_step(random_batch(spec, step), {}, hyper(step, ema=0.97))
    state = engine.export_state()
    assert np.array_equal(state[f"teacher.{name}"], state[f"student.{name}"])


def test_square_weights_are_transposed_at_the_border():
    spec = tiny_spec()
    engine = build()
    start = lively_state(spec)[SQUARE]
    _, gradients = engine.trace_step(random_batch(spec), {}, hyper())
    layer = engine.model.student.encoder.blocks[0].attn.proj
    state = engine.export_state()
    assert np.array_equal(layer.weight.numpy().T, state[SQUARE])
    assert relative_error(state[SQUARE], start) < 0.1 < relative_error(state[SQUARE].T, start)
    assert_close(state[f"optimizer.exp_avg.{SQUARE}"], 0.1 * gradients[SQUARE], 1e-14)
    assert_close(layer.weight.grad.numpy().T, gradients[SQUARE], 0.0)


# ------------------------------------------------------------------------------------- the process


def test_engines_of_both_precisions_live_side_by_side(paddle):
    engines = [build("float64"), build("float32")]
    assert paddle.get_default_dtype() == "float32"
    for engine in engines:
        metrics = engine.train_step(random_batch(engine.spec), {}, hyper())
        state = engine.export_state()
        kinds = {a.dtype.name for name, a in state.items()}
        assert metrics["loss"].numpy().dtype == engine.spec.precision
        assert kinds == {engine.spec.precision, "int64"}


def test_a_failed_build_leaves_the_default_precision(paddle):
    spec = tiny_spec()
    with pytest.raises(KeyError):
        backends.load("paddle").build(spec, {})
    assert paddle.get_default_dtype() == "float32"


def test_bfloat16_is_refused(paddle):
    # Paddle takes it, and computes in float32 without a word.
    with pytest.raises(UserError, match="precision: paddle has no bfloat16 on cpu; use float32 or"):
        build("bfloat16")


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_the_old_mkl_is_told_what_an_amd_processor_can_do(monkeypatch, vendor):
    from triptych.backends.paddle import runtime

    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE", raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id\t: {vendor}\n")
    runtime.use_fast_kernels()
    found = os.environ.get("MKL_DEBUG_CPU_TYPE")
    assert found == ("5" if vendor == "AuthenticAMD" else None)
    assert backends.load("paddle").versions()["MKL_DEBUG_CPU_TYPE"] == (found or "unset")
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "4")
    runtime.use_fast_kernels()
    assert os.environ["MKL_DEBUG_CPU_TYPE"] == "4"


FRESH = """
import os, resource, signal
caught = []
signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
from triptych import backends
backends.load("paddle")
import paddle
os.kill(os.getpid(), signal.SIGTERM)
threads = os.environ.get("OMP_NUM_THREADS")
x = paddle.ones([1 << 21])
faults = []
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x * x
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(len(caught), threads, max(faults[-5:]))
"""


def test_a_fresh_process():
    """Loading is silent and leaves SIGTERM alone; memory of 8 MiB is not fetched anew each time."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "typings"), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    caught, threads, faults = (int(number) for number in done.stdout.split())
    assert (caught, threads) == (1, 2)
    # 2048 pages of 4 KiB where the C library gives memory back.
    assert faults < 100 or platform.libc_ver()[0] != "glibc"
