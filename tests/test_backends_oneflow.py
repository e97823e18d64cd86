"""What is wrong or slow in OneFlow itself: each test fails where its plain form is put back."""

import ast
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_close
from support.native import draws, hyper, lively_state, random_batch, tiny_spec
from support.oneflow_engines import build, framework

from triptych import backends
from triptych.core.contracts import ALONE, Batch
from triptych.core.errors import UserError
from triptych.core.optim.groups import Group

RNG = np.random.default_rng(0)
ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "backends" / "oneflow").glob("*.py"))


@pytest.fixture(scope="module", autouse=True)
def flow():
    return framework()


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
    optimizer = AdamW({"a": parameter}, parameter, spec, {"a": Group()})
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


def test_norm_of_a_large_gradient(flow):
    # flow.linalg.norm loses 0.2 % here.
    from triptych.backends.oneflow.optim import AdamW

    gradient = RNG.standard_normal(1 << 22).astype(np.float32)
    parameter = flow.nn.Parameter(flow.zeros(*gradient.shape))
    optimizer = AdamW({"a": parameter}, parameter.detach(), tiny_spec().optim, {"a": Group()})
    (parameter * flow.tensor(gradient)).sum().backward()
    norm = optimizer.gradient_norm().numpy()
    assert_close(norm, np.linalg.norm(gradient.astype(np.float64)), 1e-6)


def test_norms_of_large_tensors(flow):
    from triptych.backends.oneflow.sharded import Norms

    arrays = [RNG.standard_normal(shape).astype(np.float32) for shape in ((2048, 2048), (7, 3))]
    want = [np.linalg.norm(array.astype(np.float64)) for array in arrays]
    named = {str(i): flow.tensor(array) for i, array in enumerate(arrays)}
    assert_close(Norms({}, ALONE).of(named).numpy(), want, 1e-6)


@pytest.mark.parametrize("optim", [{}, {"name": "sgd"}, {"name": "lars"}])
def test_blocks_make_no_difference(monkeypatch, optim):
    """Also where the first trained tensor is not the first of the packed ones."""
    from triptych.backends.oneflow import flat

    states = []
    for size in (1 << 20, 1000):
        monkeypatch.setattr(flat, "BLOCK", size)
        engine = build(optim={"clip_norm": 1e9, **optim})
        assert len(engine.optimizer._blocks) == -(-engine.optimizer._values.numel() // size)
        assert engine.optimizer._values.storage_offset() > 0
        for step in range(2):
            engine.train_step(random_batch(engine.spec, step), {}, hyper(step))
        states.append(engine.export_state())
    assert all(np.array_equal(states[0][name], value) for name, value in states[1].items())


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
    with pytest.raises(UserError, match="precision: oneflow has no bfloat16; use float32 or"):
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
from support.native import hyper, lively_state, random_batch, tiny_spec
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
    from triptych.backends.oneflow.plain.moco_v3 import PlainLoop

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


BLOCK = {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2", 6: "conv3", 7: "bn3"}


def torchvision_names(spec):
    """The plain queue loop's prefix of a layer -> that of the canonical name."""
    depths = spec.model.depths
    places = [(stage + 1, i) for stage, depth in enumerate(depths) for i in range(depth)]
    names = {"0.": "encoder.conv1.", "1.": "encoder.bn1."}
    for at, (stage, i) in enumerate(places, 4):
        block = f"encoder.layer{stage}.{i}"
        names |= {f"{at}.layers.{k}.": f"{block}.{layer}." for k, layer in BLOCK.items()}
        names |= {f"{at}.shortcut.{k}.": f"{block}.downsample.{k}." for k in (0, 1)}
    head = 4 + len(places) + 2
    return names | {f"{head}.": "projector.0.", f"{head + 2}.": "projector.2."}


@pytest.mark.soak
@pytest.mark.parametrize("case", ["resnet18", "resnet50"])
def test_the_plain_queue_loop_computes_the_same(flow, monkeypatch, case):
    """From the same weights and queue it has the same losses.

    In float64: the framework's batch norm loses so many float32 digits that chance would decide.
    """
    from triptych.backends.oneflow.plain.moco import PlainLoop

    model = {"name": case, "width": 64, "stem": "imagenet", "image_size": 32}
    sections = {"model": model, "method": {"name": "moco_v2", "queue_size": 32}}
    engine = build(case="moco_v1_resnet18", batch_norm={"virtual_ranks": 1}, **sections)
    spec = engine.spec
    loop, state = PlainLoop(spec), engine.export_state()
    names = torchvision_names(spec)
    for module, branch in ((loop.query, "student"), (loop.key, "teacher")):
        module.to(flow.float64)
        found = {}
        for name in module.state_dict():
            prefix = next(p for p in sorted(names, key=len, reverse=True) if name.startswith(p))
            canonical_name = f"{branch}.{names[prefix]}{name[len(prefix) :]}"
            found[name] = flow.tensor(state[canonical_name])
        module.load_state_dict(found)
    loop.queue = flow.tensor(state["memory.queue"])
    for step in range(3):
        batch, drawn, at = random_batch(spec, step), draws(spec, step), hyper(step, lr=1e-4)
        order = flow.tensor(drawn["shuffle_perm"])
        monkeypatch.setattr(flow, "randperm", lambda n, order=order: order)
        loss = engine.train_step(batch, drawn, at)["loss"]
        exact = Batch(tuple(view.astype(np.float64) for view in batch.views), batch.index)
        assert_close(loop.step(exact, at), engine.array(loss), 1e-7)
    loop.wait()
