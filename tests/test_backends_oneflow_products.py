"""Products, attention and layer norm of float32 in NumPy: the numbers of OneFlow's own forms."""

import numpy as np
import pytest
from conftest import relative_error, under_test
from support.native import differentiate, draws, hyper, lively_state, random_batch, tiny_spec

from triptych import backends

pytestmark = pytest.mark.skipif("oneflow" not in under_test(), reason="oneflow is not under test")


@pytest.fixture
def products(monkeypatch):
    """The module, as on a processor with AVX-512."""
    backends.load("oneflow")
    from triptych.backends.oneflow import products

    monkeypatch.setattr(products, "serve", lambda: True)
    return products


def arrays(*shapes):
    rng = np.random.default_rng(5)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def both(monkeypatch, products, function, *inputs):
    """Value and gradients in NumPy, and those of OneFlow's own operations in float64."""
    with monkeypatch.context() as patch:
        patch.setattr(products, "serve", lambda: False)
        probe = arrays(function(*map(_tensor, inputs)).shape)[0]
        wide = [x.astype(np.float64) for x in inputs]
        want = differentiate("oneflow", function, *wide, probe=probe.astype(np.float64))
    return want, differentiate("oneflow", function, *inputs, probe=probe)


def _tensor(array):
    import oneflow as flow

    return flow.from_numpy(array)


def assert_near(want, got, most=2e-6):
    for x, y in zip([want[0], *want[1]], [got[0], *got[1]], strict=True):
        assert y.dtype == np.float32 and x.shape == y.shape
        assert relative_error(y, x) < most


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("shapes", [((7, 5), (5, 3)), ((2, 3, 7, 5), (2, 3, 5, 4))])
def test_products(monkeypatch, products, shapes, transpose_b):
    a, b = arrays(*shapes)
    b = np.ascontiguousarray(b.swapaxes(-1, -2)) if transpose_b else b
    multiply = lambda a, b: products.matmul(a, b, transpose_b=transpose_b)  # noqa: E731
    assert_near(*both(monkeypatch, products, multiply, a, b))


@pytest.mark.parametrize("biased", [False, True])
def test_linear_maps(monkeypatch, products, biased):
    inputs = arrays((2, 7, 5), (3, 5), (3,))[: 2 + biased]
    assert_near(*both(monkeypatch, products, products.linear, *inputs))


def test_a_linear_map_differentiates_what_is_trained(products):
    x, weight, bias = map(_tensor, arrays((4, 5), (3, 5), (3,)))
    weight.requires_grad, bias.requires_grad = True, True
    products.linear(x, weight, bias).sum().backward()
    assert x.grad is None and relative_error(weight.grad.numpy()[0], x.numpy().sum(0)) < 1e-6
    assert relative_error(bias.grad.numpy(), np.full(3, 4.0)) < 1e-6
    frozen, x = weight.detach(), x.detach().requires_grad_()
    products.linear(x, frozen).sum().backward()
    assert relative_error(x.grad.numpy()[0], frozen.numpy().sum(0)) < 1e-6


def test_attention(monkeypatch, products):
    from triptych.backends.oneflow import vit

    def attend(qkv):
        if products.serve():
            return vit._attend_in_numpy(qkv, 3)
        mixed = vit._attend(*vit._split_heads(qkv, 3, 3))
        return mixed.transpose(1, 2).reshape(2, 7, -1)

    (qkv,) = arrays((2, 7, 3 * 12))
    assert_near(*both(monkeypatch, products, attend, 3 * qkv))


@pytest.mark.parametrize(("row", "most"), [(1.0, 5e-6), (1e-2, 5e-3)])
def test_layer_norm(monkeypatch, products, row, most):
    """Of more rows than a block has. Of a nearly constant row float32 holds fewer digits."""
    from triptych.backends.oneflow import layers

    monkeypatch.setattr(layers.kernels, "BLOCK", 5 * 12)
    x, weight, bias = arrays((17, 12), (12,), (12,))
    x[3] = 100.0 * (1.0 - row) + row * x[3]

    def normalize(x, weight, bias):
        layer = layers.LayerNorm(12, 1e-6).to(dtype=x.dtype)
        object.__setattr__(layer, "_parameters", {"weight": weight, "bias": bias})
        return layer(x)

    assert_near(*both(monkeypatch, products, normalize, x, weight, bias), most)


@pytest.mark.parametrize("case", ["moco_v3_vit", "moca_vit"])
def test_a_step_is_that_of_the_other_form(monkeypatch, products, case):
    spec, found = tiny_spec("float32", case), []
    for fast in (True, False):
        monkeypatch.setattr(products, "serve", lambda fast=fast: fast)
        engine = backends.load("oneflow").build(spec, lively_state(spec))
        values, gradients = engine.trace_step(random_batch(spec), draws(spec), hyper())
        found.append({**values, **gradients})
    differ = [name for name in found[0] if not np.array_equal(found[0][name], found[1][name])]
    assert differ, "one form serves both"
    norm = np.linalg.norm([np.linalg.norm(x) for x in gradients.values()])
    for name, array in found[1].items():
        if np.linalg.norm(array) > 1e-5 * norm:
            assert relative_error(found[0][name], array) < 1e-3, name


def test_what_is_not_finite_gives_no_warning(products, recwarn):
    a, b = map(_tensor, arrays((4, 4), (4, 4)))
    a[0], b[0] = float("inf"), float("nan")
    a.requires_grad, b.requires_grad = True, True
    (products.matmul(a, b).sum() + products.linear(a, b, b[1]).sum()).backward()
    assert not np.isfinite(a.grad.numpy()).all() and not recwarn.list


def test_float64_stays_with_oneflow(products):
    (x,) = arrays((3, 4))
    assert products.in_float32(_tensor(x))
    assert not products.in_float32(_tensor(x.astype(np.float64)))
