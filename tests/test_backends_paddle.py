"""What is wrong or slow in Paddle itself: each test fails where its plain form is put back."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_close, relative_error
from support.native import draws, hyper, lively_state, random_batch, tiny_spec
from support.paddle_engines import build, framework

from triptych import backends
from triptych.core.contracts import Batch
from triptych.core.errors import UserError
from triptych.core.optim.groups import Group

RNG = np.random.default_rng(0)
ROOT = Path(__file__).resolve().parent.parent
SQUARE = "student.encoder.blocks.0.attn.proj.weight"


@pytest.fixture(scope="module", autouse=True)
def paddle():
    return framework()


# ------------------------------------------------------------------------ optimizer, teacher, state


def test_norm_of_a_large_gradient(paddle):
    # paddle.linalg.norm and paddle.dot add up one after the other and lose 0.2 % here, in float32.
    from triptych.backends.paddle.optim import AdamW

    gradient = RNG.standard_normal(1 << 22).astype(np.float32)
    parameter = paddle.zeros(gradient.shape)
    parameter.stop_gradient = False
    (parameter * paddle.to_tensor(gradient)).sum().backward()
    norm = AdamW({"a": parameter}, tiny_spec().optim, {"a": Group()}).gradient_norm().numpy()
    assert_close(norm, np.linalg.norm(gradient.astype(np.float64)), 1e-6)


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_adamw_is_exact_in_float64(paddle, eps):
    from triptych.backends.paddle.optim import AdamW

    start = RNG.standard_normal((4, 3))
    parameter = paddle.to_tensor(start, stop_gradient=False)
    spec = tiny_spec(optim={"eps": eps, "betas": [0.87, 0.997]}).optim
    optimizer = AdamW({"a": parameter}, spec, {"a": Group()})
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


RULES = [
    {"name": "lars", "weight_decay": 0.1},
    {"name": "sgd", "clip_norm": 0.01},
    {"name": "sgd", "clip_norm": 1e6},
]


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("options", RULES)
def test_updates_on_a_gpu_do_not_wait_and_are_the_same(paddle, monkeypatch, options, precision):
    from triptych.backends.paddle import optim

    spec = tiny_spec(precision, optim=options).optim
    start, gradient = (RNG.standard_normal((7, 5)).astype(precision) for _ in range(2))
    updated = []
    for on_gpu in (False, True):
        parameter = paddle.to_tensor(start, stop_gradient=False)
        (parameter * paddle.to_tensor(gradient)).sum().backward()
        with monkeypatch.context() as patch:
            if on_gpu:
                patch.setattr(optim, "plain_forms_serve", lambda x: True)
            rule = optim.OPTIMIZERS[spec.name]({"a": parameter}, spec, {"a": Group()})
            if on_gpu:
                for read in ("__float__", "numpy", "item", "tolist", "__bool__"):
                    patch.delattr(paddle.Tensor, read)
            rule.step(hyper(0, lr=0.1, weight_decay=0.1))
        updated.append(parameter.numpy())
    assert np.array_equal(*updated) and not np.array_equal(updated[0], start)


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


SKYLAKE = "avx2 avx512f avx512cd avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("vendor", "flags", "kernels"),
    [
        ("AuthenticAMD", SKYLAKE, "7"),
        ("AuthenticAMD", "avx2 avx512f", "5"),
        ("AuthenticAMD", "avx2", "5"),
        ("GenuineIntel", SKYLAKE, None),
    ],
)
def test_the_old_mkl_is_told_what_an_amd_processor_can_do(monkeypatch, vendor, flags, kernels):
    from triptych.backends.paddle import runtime

    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "")  # so that it is as before after the test
    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE")
    text = f"vendor_id\t: {vendor}\nflags\t: {flags}\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    runtime.use_fast_kernels()
    found = os.environ.get("MKL_DEBUG_CPU_TYPE")
    assert found == kernels
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


# ---------------------------------------------------------------------------------- the benchmark


def paddle_name(name):
    """What a tensor of a branch is called in the networks that Paddle brings."""
    name = name.replace("running_mean", "_mean").replace("running_var", "_variance")
    name = name.replace("projector.0.", "fc.0.").replace("projector.2.", "fc.2.")
    return name.removeprefix("encoder.")


@pytest.mark.soak
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_plain_queue_loop_computes_the_same(paddle, monkeypatch, name):
    """From the same weights and queue it has the same losses.

    In float64: deep batch norms amplify float32's rounding so much that chance would decide.
    """
    from triptych.backends.paddle.plain.moco import PlainLoop

    model = {"name": name, "width": 64, "stem": "imagenet", "image_size": 64}
    sections = {"model": model, "method": {"name": "moco_v2", "queue_size": 32}}
    engine = build(case="moco_v1_resnet18", batch_norm={"virtual_ranks": 1}, **sections)
    spec, state = engine.spec, engine.export_state()
    paddle.set_default_dtype("float64")
    try:
        loop = PlainLoop(spec)
    finally:
        paddle.set_default_dtype("float32")
    for branch, network in (("student", loop.query), ("teacher", loop.key)):
        named = network.state_dict()
        for key, array in state.items():
            if key.startswith(branch) and not key.endswith("tracked"):
                tensor = named.pop(paddle_name(key.removeprefix(f"{branch}.")))
                tensor.set_value(array.T.copy() if array.ndim == 2 else array)
        assert not named
    loop.queue.set_value(state["memory.queue"])
    for step in range(3):
        batch, drawn = random_batch(spec, step), draws(spec, step)
        order = paddle.to_tensor(drawn["shuffle_perm"])
        monkeypatch.setattr(paddle, "randperm", lambda n, order=order: order)
        rates = hyper(step, lr=1e-4, weight_decay=spec.optim.weight_decay)
        loss = engine.train_step(batch, drawn, rates)["loss"]
        exact = Batch(tuple(view.astype(np.float64) for view in batch.views), batch.index)
        assert_close(loop.step(exact, rates), engine.array(loss), 1e-7)
