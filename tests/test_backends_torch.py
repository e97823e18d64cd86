"""Mixed precision in PyTorch: what is in 16 bits, what must not be, and the scale of the loss."""

from collections import defaultdict

import numpy as np
import pytest
from conftest import relative_error, under_test
from support.native import TINY, draws, hyper, lively_state, random_batch, tiny_spec

from triptych import backends
from triptych.core import config
from triptych.core.contracts import Group
from triptych.core.methods.losses import info_nce
from triptych.core.reference import ops
from triptych.core.runs.log import read_rows
from triptych.core.training import run

torch = pytest.importorskip("torch")
from support import launches  # noqa: E402 - needs PyTorch


@pytest.fixture(scope="module")
def package():
    if "torch" not in under_test():
        pytest.skip("torch is not under test")
    return backends.load("torch")


def forward(engine, spec):
    """One forward pass; the loss has no backward pass yet."""
    step = launches.step_of(engine, draws(spec), hyper())
    return launches.forward(engine, step, *engine._staged(step, random_batch(spec)))


# ------------------------------------------------------------------------- a GPU that is not there


def types_on_cuda(package, monkeypatch, spec):
    """Operation -> types of its results in a forward pass with the rules of CUDA's autocast.

    Three of them: of the networks, of what follows, and of the product of MOCA's cosines.
    """
    from triptych.backends.torch import mixed

    engine, log = package.build(spec, lively_state(spec)), launches.Launches()
    inside, outside, cosines = defaultdict(set), log.types, defaultdict(set)

    def watched(function, types):
        def call(*arguments):
            log.types = types
            result = function(*arguments)
            log.types = outside
            return result

        return call

    engine.model.compute = watched(engine.model.compute, inside)
    monkeypatch.setattr(mixed, "_product", watched(mixed._product, cosines))
    with launches.on_cuda(engine, monkeypatch), log:
        forward(engine, spec)
    return inside, outside, cosines


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", TINY)
def test_only_the_networks_are_in_half_precision_on_a_gpu(package, monkeypatch, case, precision):
    import torch

    inside, outside, cosines = types_on_cuda(package, monkeypatch, tiny_spec(precision, case))
    half, single = {getattr(torch, precision)}, {torch.float32}
    assert set.union(*outside.values()) - {torch.int64, torch.bool} == single
    assert outside["mm"] == outside["_log_softmax"] == outside["linalg_vector_norm"] == single
    assert "_log_softmax" not in inside
    assert all(inside[name] == half for name in ("convolution", "addmm", "gelu") if name in inside)
    assert inside.get("native_layer_norm", single) == single
    assert "convolution" in inside and "convolution" not in outside
    able = "dtype" in torch.ops.aten.mm.overloads()
    assert cosines.get("mm") == (single if able and case == "moca_vit" else None)


def test_the_log_sees_a_loss_in_half_precision(package, monkeypatch):
    import torch

    ops = package.ops
    narrow = lambda a, b, transpose_b=False: a.bfloat16() @ b.bfloat16().mT  # noqa: E731
    monkeypatch.setattr(ops, "matmul", narrow)
    _, outside, _ = types_on_cuda(package, monkeypatch, tiny_spec("bfloat16"))
    assert outside["mm"] == outside["_log_softmax"] == {torch.bfloat16}


# ------------------------------------------------------------------------------------- on the CPU


def test_the_backward_pass_is_not_in_mixed_precision(package, monkeypatch):
    """Under autocast the gradient of MOCA's pooling is 0.12 % too small on every value."""
    import torch

    spec = tiny_spec("bfloat16", "moca_vit")
    engine = package.build(spec, lively_state(spec))
    seen, mean_tokens = [], package.ops.mean_tokens

    def watched(x, index):
        y = mean_tokens(x, index)
        if x.requires_grad:
            x.retain_grad()
            y.retain_grad()
            seen.append((x, y, index))
        return y

    monkeypatch.setattr(package.ops, "mean_tokens", watched)
    engine.loss_and_grads(random_batch(spec), draws(spec), hyper())
    assert len(seen) == 2
    for x, y, index in seen:
        assert x.dtype == y.dtype == torch.float32
        want = np.zeros(x.shape)
        want[:, index] = y.grad.numpy().astype(np.float64)[:, None] / len(index)
        assert relative_error(x.grad.numpy(), want) < 1e-6


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", TINY)
def test_a_loss_in_16_bits_is_near_that_in_float64(package, case, half):
    """Products round to eight bits; small batch norms make more of it than large ones."""
    losses = []
    for precision in (half, "float64"):
        spec = tiny_spec(precision, case)
        engine = package.build(spec, lively_state(spec))
        values, _ = engine.loss_and_grads(random_batch(spec), draws(spec), hyper())
        losses.append(values["loss"])
    assert losses[0].dtype == np.float32
    assert 0.0 < relative_error(*losses) < 0.05


def test_behind_the_features_nothing_is_lost_in_mixed_precision(package):
    spec = tiny_spec("bfloat16")
    engine = package.build(spec, lively_state(spec))
    values, _ = engine.loss_and_grads(random_batch(spec), draws(spec), hyper())
    q1, q2, k1, k2 = (
        ops.l2_normalize(values[f"feature/{name}"].astype(np.float64))
        for name in ("q1", "q2", "k1", "k2")
    )
    want = sum(
        info_nce(ops, query, key, np.arange(len(key)), temperature=spec.method.temperature)
        for query, key in ((q1, k2), (q2, k1))
    )
    assert relative_error(values["loss"], want) < 1e-6


# ------------------------------------------------------------------------------------- float16


def whole(gradients):
    return np.concatenate([gradients[name].ravel() for name in sorted(gradients)])


@pytest.mark.parametrize(
    ("case", "accumulate"),
    [*((case, 1) for case in TINY), ("moco_v3_vit", 2), ("moca_vit", 2)],
)
def test_gradients_in_float16_are_near_those_in_float64(package, case, accumulate):
    """Nearer than in bfloat16, which rounds to fewer bits. The scale is divided out again."""
    found, train = {}, {"batch_size": 8, "accumulate": accumulate}
    for precision in ("float64", "float16", "bfloat16"):
        spec = tiny_spec(precision, case, train=train)
        engine = package.build(spec, lively_state(spec))
        if precision == "float16":
            engine.loss_scale.scale = 256
        _, gradients = engine.loss_and_grads(random_batch(spec), draws(spec), hyper())
        found[precision] = whole(gradients)
    errors = {
        precision: np.linalg.norm(found[precision] - found["float64"])
        / np.linalg.norm(found["float64"])
        for precision in ("float16", "bfloat16")
    }
    assert 0.0 < errors["float16"] < 0.7 * errors["bfloat16"]


def test_without_a_scale_small_gradients_are_lost_in_float16(package):
    """So the scale does what it is for: with a weight of the loss of 1e-6 all would be 0."""
    norms = {}
    for scale in (1, 2**16):
        spec = tiny_spec("float16", "moca_vit")
        weights = {"image_weight": 1e-6, "dense_weight": 1e-6}
        method = spec.method.model_copy(update=weights)
        spec = spec.model_copy(update={"method": method})
        engine = package.build(spec, lively_state(spec))
        engine.loss_scale.scale = scale
        _, gradients = engine.loss_and_grads(random_batch(spec), draws(spec), hyper())
        norms[scale] = np.linalg.norm(gradients["student.encoder.blocks.0.mlp.fc1.weight"])
    assert norms[1] < 0.9 * norms[2**16]


def test_an_update_whose_gradients_are_not_finite_is_left_out(package):
    spec = tiny_spec("float16")
    engine = package.build(spec, lively_state(spec))
    engine.loss_scale.scale = 2**32
    before = engine.export_state()
    metrics = engine.read(engine.train_step(random_batch(spec), draws(spec), hyper(), monitor=True))
    after = engine.export_state()
    assert np.isfinite(metrics["loss"]) and "gradient_norm" not in metrics
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert not any(name.startswith(("student.encoder.blocks", "optimizer.exp")) for name in changed)
    assert any(name.startswith("teacher.") for name in changed)
    assert after["optimizer.step"] == 0 and engine.steps_done() == 1
    assert after["optimizer.scale"] == 2**31 and after["optimizer.skipped"] == 1
    for step in range(1, 40):
        metrics = engine.train_step(random_batch(spec), draws(spec, step), hyper(), monitor=True)
    assert "gradient_norm" in metrics and 1 < engine.loss_scale.skipped < 40
    assert engine.optimizer.count == 40 - engine.loss_scale.skipped


@pytest.mark.parametrize(
    ("precision", "case"), [("float16", "moco_v3_vit"), ("bfloat16", "moco_v2_bottleneck")]
)
def test_a_run_in_16_bits_goes_on_from_its_state(package, precision, case):
    """With the scale of its loss, and with channels that are last in memory."""
    spec = tiny_spec(precision, case)
    engine = package.build(spec, lively_state(spec))
    for step in range(4):
        engine.train_step(random_batch(spec), draws(spec, step), hyper())
    other = package.build(spec, lively_state(spec))
    other.import_state(engine.export_state())
    for each in (engine, other):
        each.train_step(random_batch(spec), draws(spec, 4), hyper())
    want, got = engine.export_state(), other.export_state()
    assert ("optimizer.scale" in got) == (precision == "float16")
    assert all(np.array_equal(want[name], got[name]) for name in want)


def test_the_log_says_which_updates_were_left_out(package, tmp_path, capsys):
    """The gradients of the first steps are too large for the first scale."""
    keys = ["precision=float16", "device=cpu", "threads=1", "evaluate.every=0"]
    keys += ["train.steps=6", "train.batch_size=16", "log.every=1", "log.tensorboard=false"]
    spec = config.load("moco_v2/digits", [*keys, "batch_norm.virtual_ranks=1"])
    assert run.train(spec, "torch", tmp_path / "run", say=print) is None
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    skipped = [row["skipped_updates"] for row in rows]
    assert [row["loss_scale"] for row in rows] == [2**16 // 2**count for count in skipped]
    for row, before, after in zip(rows, [0, *skipped], skipped, strict=False):
        assert ("gradient_norm" in row) == (before == after), row
    assert 0 < skipped[-1] < 6 and "update left out" in capsys.readouterr().out


# ----------------------------------------------------------------------- activations computed again


@pytest.mark.parametrize(
    ("precision", "case"), [("float64", "moca_vit"), ("bfloat16", "moco_v3_vit")]
)
def test_activations_that_are_computed_again_are_the_same(package, precision, case):
    """Equal to the last bit, with fewer values kept for the backward pass."""
    import torch

    results, kept = [], []
    for recompute in (False, True):
        spec = tiny_spec(precision, case, parallel={"recompute": recompute})
        engine, sizes = package.build(spec, lively_state(spec)), []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward(engine, spec)
        results.append(engine.trace_step(random_batch(spec), draws(spec), hyper()))
        kept.append(sum(sizes))
    for want, got in zip(*results, strict=True):
        assert got.keys() == want.keys()
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert kept[1] < 0.6 * kept[0]


def test_attention_in_bfloat16_is_in_parts_on_the_cpu_and_computes_the_same(package):
    """Its kernel's backward pass takes longer there. The class token's own row keeps the kernel."""
    spec = tiny_spec("bfloat16")
    kernel, counts, found = "_scaled_dot_product_flash_attention_for_cpu", [], []
    for fused in (True, False):
        engine = package.build(spec, lively_state(spec))
        if fused:
            launches.fuse_attention(engine)
        with launches.Launches() as log:
            metrics = engine.train_step(random_batch(spec), draws(spec), hyper(), monitor=True)
        counts.append((log.count[kernel], log.count["_softmax"]))
        found.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    (kernels, softmax), (kernels_of_parts, softmax_of_parts) = counts
    assert kernels == spec.model.depth * kernels_of_parts
    assert softmax_of_parts - softmax == kernels - kernels_of_parts > 0
    np.testing.assert_allclose(found[0], found[1], rtol=0.02)


# --------------------------------------------------------- orders in memory that change no number


def hastened(package, case, last, **sections):
    """What two engines in float64 compute in a step, the second with its ResNets hastened."""
    from triptych.backends.torch.resnet import ResNet

    spec, found = tiny_spec("float64", case, **sections), []
    for faster in (False, True):
        engine = package.build(spec, lively_state(spec))
        encoders = [m for m in engine.model.modules() if isinstance(m, ResNet)]
        for encoder in encoders if faster else ():
            encoder.hasten(last=last)
            engine.optimizer = engine._optimizer()  # its moments lie in memory as the weights do
        values, gradients = engine.trace_step(random_batch(spec), draws(spec), hyper())
        features = engine.embed(random_batch(spec).views[0], layers=[1], tokens="all")
        found.append({**values, **gradients, **features, **engine.export_state()})
    assert len(encoders) == 2
    return found


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("variance", ["biased", "unbiased"])
@pytest.mark.parametrize("case", ["moco_v2_bottleneck", "moco_v3_resnet18"])
def test_orders_in_memory_change_no_number(package, case, last, variance):
    norm = {"virtual_ranks": 1 if case == "moco_v3_resnet18" else 4, "running_variance": variance}
    want, got = hastened(package, case, last, batch_norm=norm)
    assert want.keys() == got.keys() and any(name.endswith("running_var") for name in want)
    for name, array in want.items():
        assert got[name].flags.c_contiguous
        assert relative_error(got[name], array) < 1e-10, name


def test_float64_keeps_every_bit_and_others_have_channels_last(package):
    from triptych.backends.torch.resnet import ResNet

    orders = {}
    for precision in ("float64", "float32", "bfloat16", "float16"):
        spec = tiny_spec(precision, "moco_v2_bottleneck", batch_norm={"virtual_ranks": 2})
        engine = package.build(spec, lively_state(spec))
        encoders = [m for m in engine.model.modules() if isinstance(m, ResNet)]
        (orders[precision],) = {(m.turns, m.channels_last) for m in encoders}
    last = (1, True)
    assert orders == {
        "float64": (1, False), "float32": last, "bfloat16": last, "float16": last
    }  # fmt: skip


@pytest.mark.parametrize("last", [False, True])
def test_an_uneven_last_batch_is_divided_as_it_was(package, last):
    """Ten images of four virtual ranks: parts of three, three, three and one."""
    import torch

    from triptych.backends.torch.layers import set_batch_norm
    from triptych.backends.torch.resnet import ResNet

    spec = tiny_spec("float32", "moco_v2_bottleneck", batch_norm={"virtual_ranks": 4})
    torch.manual_seed(0)
    images, outputs = torch.randn(10, 3, *spec.model.image_size), []
    for faster in (False, True):
        torch.manual_seed(1)
        encoder = ResNet(spec.model)
        set_batch_norm(encoder, spec.batch_norm, Group())
        if faster:
            encoder.hasten(last=last)
        outputs.append(encoder(images))
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-4) if last else torch.equal(*outputs)
