"""What is wrong or slow in OneFlow itself: each test fails where its plain form is put back."""

import ast
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_close, requested
from native import differentiate, hyper, lively_state, random_batch, tiny_spec
from scipy.special import ndtr

from triptych import backends
from triptych.core.errors import NonFiniteError, UserError

RNG = np.random.default_rng(0)
ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "backends" / "oneflow").glob("*.py"))


@pytest.fixture(scope="module", autouse=True)
def flow():
    """The framework, loaded by the backend; missing although requested, it fails."""
    names = requested()
    if "oneflow" not in (backends.installed() if names is None else names):
        pytest.skip("oneflow is not installed, or not requested by TRIPTYCH_BACKENDS")
    backends.load("oneflow")
    import oneflow

    return oneflow


@pytest.fixture
def layers(flow):
    from triptych.backends.oneflow import layers

    return layers


@pytest.fixture
def kernels(flow):
    from triptych.backends.oneflow import kernels

    return kernels


def build(precision="float64", change=None, **sections):
    spec = tiny_spec(precision, **sections)
    return backends.load("oneflow").build(spec, {**lively_state(spec), **(change or {})})


def normalized(x, axis, eps):
    x = x.astype(np.longdouble)
    centred = x - x.mean(axis, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis, keepdims=True) + np.longdouble(eps))


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


def test_layer_norm_is_not_the_slow_one(flow, layers):
    # The kernel takes twelve times as long; twice leaves room for a busy machine.
    x = flow.tensor(RNG.standard_normal((2000, 64)).astype(np.float32)).requires_grad_(True)
    plain, fast = flow.nn.LayerNorm(64, 1e-6), layers.LayerNorm(64, 1e-6)
    seconds = {plain: [], fast: []}
    for _ in range(5):
        for layer, times in seconds.items():
            start = time.process_time()
            layer(x).sum().backward()
            x.grad.numpy()
            times.append(time.process_time() - start)
    assert 2 * min(seconds[fast]) < min(seconds[plain])


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_takes_eps_to_the_last_bit(flow, layers, training):
    x = RNG.standard_normal((8, 6)) * 1e-4
    layer = layers.BatchNorm(6, affine=False).to(flow.float64)
    if not training:
        layer.running_mean.copy_(flow.tensor(x.mean(0)))
        layer.running_var.copy_(flow.tensor(x.var(0)))
        layer.eval()
    assert_close(layer(flow.tensor(x)).numpy(), normalized(x, 0, 1e-5), 1e-13)


def test_running_statistics_are_those_of_pytorch(flow, layers):
    layer = layers.BatchNorm(6).to(flow.float64)
    mean, variance = np.zeros(6), np.ones(6)
    for _ in range(5):
        x = RNG.standard_normal((8, 6)) * 3 + 1
        layer(flow.tensor(x))
        mean = 0.9 * mean + 0.1 * x.mean(0)
        variance = 0.9 * variance + 0.1 * x.var(0, ddof=1)
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
def test_numpy_forms_can_be_switched_off(layers, precision):
    spec = tiny_spec(precision)
    results = []
    for enabled in (True, False):
        with layers.numpy_forms(enabled):
            results.append(build(precision).loss_and_grads(random_batch(spec), {}, hyper()))
    (values, grads), (plain_values, plain_grads) = results
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


def test_norm_of_a_large_gradient(flow):
    # flow.linalg.norm loses 0.2 % here.
    from triptych.backends.oneflow.optim import AdamW

    gradient = RNG.standard_normal(1 << 22).astype(np.float32)
    parameter = flow.nn.Parameter(flow.zeros(*gradient.shape))
    optimizer = AdamW({"a": parameter}, parameter.detach(), tiny_spec().optim)
    (parameter * flow.tensor(gradient)).sum().backward()
    norm = optimizer.gradient_norm().numpy()
    assert_close(norm, np.linalg.norm(gradient.astype(np.float64)), 1e-6)


# ------------------------------------------------------------------------ packed tensors, optimizer


def test_packed_parameters_know_where_they_begin(flow):
    # nn.Parameter(view) and parameter.data = view do not: reshape and slice read elsewhere.
    engine = build()
    state = engine.export_state()
    offsets = set()
    for name, parameter in engine.model.named_parameters():
        offsets.add(parameter.storage_offset())
        value = state[name]
        assert isinstance(parameter, flow.nn.Parameter), name
        assert np.array_equal(parameter.reshape(-1).numpy(), value.reshape(-1)), name
        assert np.array_equal(parameter[-1:].numpy(), value[-1:]), name
    assert len(offsets) > 40


def test_gradients_are_views_of_one_buffer_and_never_pile_up():
    engine = build(model={"freeze_patch_embed": False})
    batch = random_batch(engine.spec)
    _, first = engine.loss_and_grads(batch, {}, hyper(ema=1.0))
    _, second = engine.loss_and_grads(batch, {}, hyper(ema=1.0))
    assert all(np.array_equal(first[n], second[n]) for n in first)
    buffer = np.concatenate([gradient.reshape(-1) for gradient in second.values()])
    assert np.array_equal(engine.optimizer._gradients.numpy(), buffer)
    assert_close(engine.gradient_norm().numpy(), np.linalg.norm(buffer), 1e-14)
    for name, parameter in engine.optimizer.named.items():
        assert np.array_equal(parameter.grad.numpy(), second[name]), name


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_adamw_is_exact_in_float64(flow, eps):
    # OneFlow's own is 1e-7 off after one step: its hyper-parameters are float32.
    from triptych.backends.oneflow.optim import AdamW

    start = RNG.standard_normal(12)
    parameter = flow.nn.Parameter(flow.tensor(start))
    spec = tiny_spec(optim={"eps": eps, "betas": [0.87, 0.997]}).optim
    optimizer = AdamW({"a": parameter}, parameter, spec)
    p, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for step in range(1, 51):
        gradient = RNG.standard_normal(12) * np.repeat([1.0, 1e-6, 0.0], 4)
        h = hyper(step - 1, lr=0.01 * step, weight_decay=0.3 / step)
        optimizer.zero_grad()
        (parameter * flow.tensor(gradient)).sum().backward()
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
    # The teacher follows the student's frozen projection too; their position tables are equal.
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


# ------------------------------------------------------------------------------------ shared memory


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_no_array_shares_memory_with_a_tensor(precision):
    engine = build(precision)
    given = np.ones((2, 3), precision)
    tensor = engine.tensor(given)
    given[:] = 7.0
    taken = engine.array(tensor)
    assert (taken == 1.0).all()
    taken[:] = 5.0
    assert (engine.array(tensor) == 1.0).all()
    state = engine.export_state()
    kept = {name: value.copy() for name, value in state.items()}
    engine.train_step(random_batch(engine.spec), {}, hyper())
    assert all(np.array_equal(state[name], kept[name]) for name in state)
    engine.import_state(state)
    for value in state.values():
        value[...] = 3
    again = engine.export_state()
    assert all(np.array_equal(again[name], kept[name]) for name in kept)


def test_engines_of_both_precisions_live_side_by_side():
    for engine in (build("float64"), build("float32")):
        metrics = engine.train_step(random_batch(engine.spec), {}, hyper())
        kinds = {array.dtype.name for array in engine.export_state().values()}
        assert engine.array(metrics["loss"]).dtype == engine.spec.precision
        assert kinds == {engine.spec.precision, "int64"}


def test_bfloat16_is_refused():
    with pytest.raises(
        UserError, match="precision: oneflow has no bfloat16 on cpu; use float32 or"
    ):
        build("bfloat16")


def test_contexts_of_functions_keep_saved_tensors_only():
    # Any attribute set on one is freed too early: the process ends in a segmentation fault.
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [ast.unparse(target) for target in targets if target is not None]
            assert not any(name.startswith("ctx.") for name in names), (path.name, names)


# ------------------------------------------------------------------------------------- the process


@pytest.mark.parametrize("package", ["cublas", "cudnn"])
def test_a_missing_library_is_named(monkeypatch, package):
    from triptych.backends.oneflow import runtime

    library = next(library for owner, library in runtime.LIBRARIES if owner == package)
    runtime.load_library(package, library)
    monkeypatch.setattr(runtime.Path, "is_file", lambda path: False)
    with pytest.raises(UserError, match=rf"lib\S+\.so\.0, .* pip install nvidia-{package}-cu11=="):
        runtime.load_library(package, f"{library.partition('.so')[0]}.so.0")


@pytest.mark.parametrize(
    ("flags", "given", "told"),
    [
        ("sse2 avx avx2 fma", None, "Haswell"),
        ("sse2 avx", None, None),
        ("sse2 avx", "Zen", "Zen"),
        ("sse2 avx avx2 fma", "Zen", "Zen"),
    ],
)
def test_the_old_openblas_is_told_what_a_processor_can_do(monkeypatch, flags, given, told):
    from triptych.backends.oneflow import runtime

    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    if given:
        monkeypatch.setenv("OPENBLAS_CORETYPE", given)
    monkeypatch.setattr(Path, "read_text", lambda path: f"processor: 0\nflags\t\t: {flags}\n")
    with runtime.fast_kernels():
        assert os.environ.get("OPENBLAS_CORETYPE") == told
    assert os.environ.get("OPENBLAS_CORETYPE") == given
    assert backends.load("oneflow").versions()["OPENBLAS_CORETYPE"] == (told or "unset")


FRESH = """
import os, resource, signal, sys
caught = []
signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
sys.path.insert(0, "tests")
from native import hyper, lively_state, random_batch, tiny_spec
from triptych import backends
backend = backends.load("oneflow")
import numpy as np
os.kill(os.getpid(), signal.SIGTERM)
x = np.ones(1 << 20, np.float32)
faults = []
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [x * x for _ in range(8)]
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
spec = tiny_spec("float32")
engine = backend.build(spec, lively_state(spec))
for step in range(2):
    engine.train_step(random_batch(spec, step), {}, hyper(step), monitor=True)
print(len(caught), max(faults[-5:]), "OPENBLAS_CORETYPE" in os.environ)
"""


def test_a_fresh_process():
    """It keeps SIGTERM and the memory of its arrays, has fast products, and ends as it should."""
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    environment |= {"PYTHONPATH": str(ROOT / "typings"), "OPENBLAS_VERBOSE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = set(done.stderr.splitlines())
    if backends.load("oneflow").versions()["OPENBLAS_CORETYPE"] == "Haswell":
        assert "Core: Haswell" in lines
    said = {line for line in lines if not line.startswith("Core: ")}
    assert said <= {"libibverbs not available, ibv_fork_init skipped"}
    caught, faults, leaked = done.stdout.split()
    assert (caught, leaked) == ("1", "False")
    # 1024 pages of 4 KiB and array where the C library gives memory back.
    assert int(faults) < 100 or platform.libc_ver()[0] != "glibc"


CANONICAL = (
    ("0.patch_embed.", "encoder.patch_embed.proj."),
    ("0.", "encoder."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.2.", ".mlp.fc2."),
)


def canonical(name):
    """The plain loop's name of an encoder's or projector's tensor, translated."""
    if name[0] != "0":
        layer, _, rest = name.partition(".")
        return f"projector.{int(layer) - 1}.{rest}"
    for old, new in CANONICAL:
        name = name.replace(old, new, 1) if old[0] == "." or name.startswith(old) else name
    return name


def test_the_plain_loop_computes_the_same(flow):
    """The loop of the benchmark: from the same weights it has the same losses."""
    from triptych.backends.oneflow.baseline import PlainLoop

    spec = tiny_spec("float32")
    loop, engine = PlainLoop(spec), build("float32")
    trained = sum(p.numel() for group in loop.optimizer.param_groups for p in group.parameters)
    assert trained == engine.optimizer._values.numel()
    state = engine.export_state()
    for module, translate in (
        (loop.query, lambda name: f"student.{canonical(name)}"),
        (loop.key, lambda name: f"teacher.{canonical(name)}"),
        (loop.predictor, lambda name: f"student.predictor.{name}"),
    ):
        module.load_state_dict({n: flow.tensor(state[translate(n)]) for n in module.state_dict()})
    for step in range(3):
        batch = random_batch(spec, step)
        loss = engine.train_step(batch, {}, hyper(step))["loss"]
        assert_close(loop.step(batch, hyper(step)), engine.array(loss), 1e-4 * 10**step)
    loop.wait()
