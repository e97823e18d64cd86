"""bfloat16 in Paddle: what is in 16 bits on a GPU, what must not be, and how near numbers are."""

import numpy as np
import pytest
from conftest import under_test
from support import paddle_mixed
from support.native import TINY, draws, hyper, lively_state, pairs, random_batch, tiny_spec
from support.paddle_engines import framework

from triptych import backends
from triptych.core.errors import UserError
from triptych.core.machine import cuda, devices

pytestmark = pytest.mark.filterwarnings(
    "ignore:amp_guard can only be", "ignore:In static graph mode", "ignore:Tensor do not have"
)

HALF, SINGLE = {"bfloat16"}, {"float32"}
BARS = {
    "moco_v3_vit": 0.15,
    "moca_vit": 0.02,
    "moco_v3_resnet18": 0.6,
    "moco_v2_bottleneck": 0.45,
}
"""Largest relative error of the whole gradient, as for PyTorch."""
IN_FLOAT32 = ("layer_norm", "softmax", "mean", "sum", "square", "rsqrt", "divide")


@pytest.fixture(scope="module", autouse=True)
def paddle():
    paddle = framework()
    if paddle.__version__.startswith("2."):
        pytest.skip("the graphs of Paddle 2 do not show the types of their values")
    return paddle


def observed(engine):
    """What the engine computes in the precision of the run, in one step: (part, arguments)."""
    seen, compute = {}, engine.model.compute

    def watched(part, *arguments):
        seen.setdefault(part, arguments)
        return compute(part, *arguments)

    engine.model.compute = watched
    engine.loss_and_grads(random_batch(engine.spec), draws(engine.spec), hyper())
    engine.model.compute = compute
    return seen


# ------------------------------------------------------------------------- a GPU that is not there


@pytest.mark.parametrize("case", [*BARS, "moco_v3_vit_conv"])
def test_types_on_a_gpu(monkeypatch, case):
    engine = paddle_mixed.build(monkeypatch, case)
    parts = observed(engine)
    assert len(parts) >= 4
    for part, arguments in parts.items():
        with monkeypatch.context() as patch:
            found, returned = paddle_mixed.types(patch, engine.model.compute, part, arguments)
        products = set.union(set(), *(found.pop(name, set()) for name in ("conv2d", "matmul")))
        assert products == HALF and returned == SINGLE
        for name in IN_FLOAT32:
            assert found.get(name, SINGLE) - {"int64"} == SINGLE, name
        # The values may have 16 bits, statistics and gains may not.
        assert found["batch_norm"] <= {("bfloat16", "float32"), ("float32", "float32")}
        assert found["builtin.parameter"] <= {"float32", "int64"}


def test_without_mixed_precision_nothing_has_16_bits(monkeypatch):
    engine = paddle_mixed.build(monkeypatch, precision="float32")
    for part, arguments in observed(engine).items():
        with monkeypatch.context() as patch:
            found, _ = paddle_mixed.types(patch, engine.model.compute, part, arguments)
        assert "bfloat16" not in set.union(*found.values())


def test_norms_of_rows_and_means_of_tokens_are_in_float32(monkeypatch, paddle):
    engine = paddle_mixed.build(monkeypatch)
    from triptych.backends.paddle.layers import unit_rows

    rows = paddle.to_tensor(np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32))
    half = rows.astype(paddle.bfloat16)
    assert unit_rows(half, 1e-5).dtype == paddle.float32
    wide = half.astype(paddle.float32)
    np.testing.assert_array_equal(unit_rows(half, 1e-5).numpy(), unit_rows(wide, 1e-5).numpy())
    mean, tokens = engine.model.student.encoder.mean, rows.reshape([1, 3, 5])
    with monkeypatch.context() as patch:
        found, _ = paddle_mixed.types(patch, engine.model.compute, mean, (tokens,))
    assert found["mean"] == {"float32", "int64"} and "matmul" not in found
    np.testing.assert_allclose(mean(tokens).numpy(), rows[1:].mean(0, keepdim=True).numpy(), 1e-6)


def test_attention_is_paddles_in_16_bits_alone(monkeypatch, paddle):
    """A linear layer on a GPU gives 16 bits; in a graph, whose types are tested, it does not."""
    from triptych.backends.paddle import vit

    calls = []
    monkeypatch.setattr(
        vit.F, "scaled_dot_product_attention", lambda *parts: calls.append(parts) or parts[0]
    )
    x = paddle.ones([2, 3, 7, 8])
    vit._attend(x, x, x)
    assert not calls
    half = x.astype(paddle.bfloat16)
    assert vit._attend(half, half, half).shape == x.shape
    assert [part.shape for part in calls[0]] == [[2, 7, 3, 8]] * 3


@pytest.mark.parametrize("queries", [1, 7])
def test_paddles_attention_is_ours(monkeypatch, paddle, queries):
    from triptych.backends.paddle import vit

    shapes = [(2, 3, queries, 8), (2, 3, 7, 8), (2, 3, 7, 8)]
    arrays = [np.random.default_rng(i).standard_normal(shape) for i, shape in enumerate(shapes)]
    found = []
    for fused in (False, True):
        monkeypatch.setattr(vit, "_fused_attention_serves", lambda x, fused=fused: fused)
        parts = [paddle.to_tensor(array, stop_gradient=False) for array in arrays]
        mixed = vit._attend(*parts)
        (mixed * mixed).sum().backward()
        found.append([mixed.numpy(), *(x.grad.numpy() for x in parts)])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-12, atol=1e-13)


# ----------------------------------------------------------------- numbers, by products of bfloat16


def computed(monkeypatch, precision, case, step=False, **sections):
    """An engine after a step, what it measured, and the calls of products."""
    with monkeypatch.context() as patch:
        engine = paddle_mixed.build(patch, case, precision, **sections)
        rounding = paddle_mixed.Rounding(patch)
        given = pairs(engine.spec), draws(engine.spec), hyper()
        found = engine.trace_step(*given) if step else engine.loss_and_grads(*given)
    return engine, *found, rounding.calls


def whole(gradients):
    return np.concatenate([gradients[n].astype(np.float64).ravel() for n in sorted(gradients)])


@pytest.mark.parametrize("case", BARS)
def test_gradients_in_bfloat16_are_near_those_in_float64(monkeypatch, case):
    changes = {"train": {"batch_size": 16}}
    if "queue_size" in TINY[case]["method"]:
        changes |= {"method": {"queue_size": 64}}
    _, half, got, calls = computed(monkeypatch, "bfloat16", case, **changes)
    _, exact, want, outside = computed(monkeypatch, "float64", case, **changes)
    assert 0.0 < abs(half["loss"] / exact["loss"] - 1.0) < 0.05
    assert all(np.isfinite(gradient).all() for gradient in got.values())
    error = np.linalg.norm(whole(got) - whole(want)) / np.linalg.norm(whole(want))
    assert 1e-3 < error < BARS[case]
    # The networks' products are within autocast, those of the logits are not.
    assert {n: sum(c) for n, c in calls.items()} == {n: sum(c) for n, c in outside.items()}
    assert all(within == 0 for _, within in outside.values())
    assert calls["conv2d"][0] == calls["linear"][0] == 0 < calls["matmul"][0]
    assert calls["conv2d"][1] > 0 and calls["linear"][1] + calls["matmul"][1] > 0


def test_parameters_gradients_and_moments_stay_in_float32(monkeypatch, paddle):
    engine, values, gradients, _ = computed(monkeypatch, "bfloat16", "moco_v3_vit", step=True)
    assert {v.dtype for v in (*values.values(), *gradients.values())} == {np.dtype(np.float32)}
    state = engine.export_state()
    assert {a.dtype for a in state.values()} == {np.dtype(np.float32), np.dtype(np.int64)}
    own = [*engine.model.parameters(), *engine.optimizer.moments()["exp_avg"].values()]
    assert {tensor.dtype for tensor in own} == {paddle.float32}


def test_recomputed_blocks_are_in_bfloat16_too(monkeypatch):
    recompute = {"parallel": {"recompute": True}}
    _, _, want, calls = computed(monkeypatch, "bfloat16", "moco_v3_vit")
    _, _, got, again = computed(monkeypatch, "bfloat16", "moco_v3_vit", **recompute)
    assert all(np.array_equal(got[name], want[name]) for name in want)
    assert again["linear"][1] > calls["linear"][1] and again["linear"][0] == 0


def test_a_run_in_bfloat16_goes_on_from_pytorch(monkeypatch):
    if not {"torch", "paddle"} <= set(under_test()):
        pytest.skip("torch and paddle are not both under test")
    spec = tiny_spec("bfloat16")
    begun = backends.load("torch").build(spec, lively_state(spec))
    for step in range(2):
        begun.train_step(random_batch(spec, step), draws(spec, step), hyper(step))
    losses = []
    with monkeypatch.context() as patch:
        resumed = paddle_mixed.build(patch)
        paddle_mixed.Rounding(patch)
        resumed.import_state(begun.export_state())
        for engine in (begun, resumed):
            metrics = engine.train_step(random_batch(spec, 2), draws(spec, 2), hyper(2))
            losses.append(float(engine.array(metrics["loss"])))
    assert resumed.steps_done() == 3
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("card", "refused"),
    [
        (cuda.Card("Tesla V100", (7, 0)), "paddle has no bfloat16 on Tesla V100 .sm_70.; use"),
        (cuda.Card("A100", (8, 0)), None),
    ],
)
def test_cards_without_bfloat16_are_refused(monkeypatch, card, refused):
    """There, Paddle warns once and computes in float32."""
    package = backends.load("paddle")
    devices.prepare_libraries("bfloat16")
    monkeypatch.setattr(cuda, "cards", lambda: (card,))
    monkeypatch.setattr(package, "cuda_devices", lambda: 1)
    monkeypatch.setattr(package, "cuda_code", lambda: ("sm_70", "sm_80"))
    spec = tiny_spec("bfloat16").model_copy(update={"device": "cuda:0"})
    if refused is None:
        assert package.device_of(spec) == "cuda:0"
        return
    with pytest.raises(UserError, match=refused):
        package.device_of(spec)
    assert package.device_of(spec.model_copy(update={"precision": "float32"})) == "cuda:0"
