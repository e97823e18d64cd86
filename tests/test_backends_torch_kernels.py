"""Matrix products of PyTorch by oneDNN: when, and that they are the same products."""

import pytest
from conftest import under_test
from support.native import draws, hyper, lively_state, random_batch, tiny_spec

from triptych import backends

AMD = frozenset({"AuthenticAMD", "avx2", "fma", "avx512f"})


@pytest.fixture
def kernels(monkeypatch):
    """The module, on a processor on which oneDNN serves."""
    if "torch" not in under_test():
        pytest.skip("torch is not under test")
    from triptych.backends.torch import kernels

    if not kernels._available():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(kernels, "processor", lambda: AMD)
    yield kernels
    kernels.choose(onednn=False)


def counted(kernels, monkeypatch):
    """The shapes of the products that go to oneDNN, as they come."""
    shapes, linear = [], kernels._linear

    def watched(a, b, bias):
        shapes.append((tuple(a.shape), tuple(b.shape), bias is not None))
        return linear(a, b, bias)

    monkeypatch.setattr(kernels, "_linear", watched)
    return shapes


def test_a_layer_and_its_gradients_are_three_products(kernels, monkeypatch):
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    x, weight, bias, gradient = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((8, 40, 128), (112, 128), (112,), (8, 40, 112))
    )
    shapes = counted(kernels, monkeypatch)
    kernels.choose(onednn=True)
    found = {}
    for dtype in (torch.float64, torch.float32):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
        y = F.linear(*leaves)
        y.backward(gradient.to(dtype))
        found[dtype] = [y.detach(), *(leaf.grad for leaf in leaves)]
    forward = ((320, 128), (128, 112), True)
    assert shapes[0] == forward and len(shapes) == 3  # none of float64
    assert not any(has_bias for _, _, has_bias in shapes[1:])
    for exact, single in zip(found[torch.float64], found[torch.float32], strict=True):
        assert single.dtype == torch.float32 and single.shape == exact.shape
        assert (single - exact).abs().max() < 1e-5 * exact.abs().max()


ORDERS = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.t().contiguous().t(),
    "every other row and column": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 1)[
        ::2, ::2
    ],
}


@pytest.mark.parametrize("of_a", ORDERS)
@pytest.mark.parametrize("of_b", ORDERS)
@pytest.mark.parametrize("shape", [(130, 90, 50), (50, 90, 130)], ids=["high", "wide"])
def test_products_in_any_order_of_memory(kernels, monkeypatch, of_a, of_b, shape):
    """The smaller matrix is the one that is copied; wide ones in rows are taken in parts."""
    import torch

    monkeypatch.setattr(kernels, "SMALLEST", 1)
    monkeypatch.setattr(kernels, "LONG", 100)
    monkeypatch.setattr(kernels, "LARGE", 90 * 130)
    monkeypatch.setattr(kernels, "COLUMNS", 48)
    shapes = counted(kernels, monkeypatch)
    kernels.choose(onednn=True)
    height, depth, width = shape
    generator = torch.Generator().manual_seed(1)
    a = ORDERS[of_a](torch.randn(height, depth, generator=generator))
    b = ORDERS[of_b](torch.randn(depth, width, generator=generator))
    found, exact = torch.mm(a, b), a.double() @ b.double()
    assert found.is_contiguous()
    assert (found - exact).abs().max() < 1e-6 * exact.abs().max()
    high = height > width
    turned = high and of_a != "rows"
    parts = of_a == "columns" if turned else not high and of_b == "rows"
    assert len(shapes) == (3 if parts else 1)
    assert shapes[0][0] == ((width, depth) if turned else (height, depth))


def test_other_products_keep_pytorchs_kernels(kernels, monkeypatch):
    import torch

    a, b = torch.randn(300, 200), torch.randn(200, 100)
    own = {name: product(a, b) for name, product in PRODUCTS.items()}
    kernels.choose(onednn=True)
    shapes = counted(kernels, monkeypatch)
    for name, product in PRODUCTS.items():
        assert torch.equal(product(a, b), own[name]), name
    assert shapes == []


PRODUCTS = {
    "small": lambda a, b: a[:9] @ b,
    "empty": lambda a, b: a[:0] @ b,
    "float64": lambda a, b: a.double() @ b.double(),
    "bfloat16": lambda a, b: a.bfloat16() @ b.bfloat16(),
    "integers": lambda a, b: a.long() @ b.long(),
    "scaled": lambda a, b: b.new_ones(100).addmm(a, b, beta=0.5, alpha=2.0),
    "matrix added": lambda a, b: b.new_ones(300, 100).addmm(a, b),
    "a batch": lambda a, b: a[None] @ b[None],
}


def test_the_processor_decides(kernels, monkeypatch):
    torch = backends.load("torch")
    choices = {
        "oneDNN": AMD,
        "default, no AVX-512": AMD - {"avx512f"},
        "default, Intel": AMD - {"AuthenticAMD"} | {"GenuineIntel"},
        "default, unknown": frozenset(),
    }
    for name, words in choices.items():
        monkeypatch.setattr(kernels, "processor", lambda words=words: words)
        assert torch.versions()["float32 products"] == name.split(",")[0]


def test_a_run_trains_by_them_and_loops_to_compare_with_do_not(kernels, monkeypatch):
    torch = backends.load("torch")
    spec, exact = tiny_spec("float32"), tiny_spec("float64")
    monkeypatch.setattr(kernels, "SMALLEST", 1)
    shapes = counted(kernels, monkeypatch)
    losses = []
    for words in (AMD, frozenset()):
        monkeypatch.setattr(kernels, "processor", lambda words=words: words)
        engine = torch.build(spec, lively_state(spec))
        losses.append(engine.train_step(random_batch(spec), draws(spec), hyper())["loss"])
        losses[-1] = float(losses[-1])
        if words:
            count = len(shapes)
            with kernels.torch_defaults():
                engine.train_step(random_batch(spec), draws(spec), hyper())
            assert len(shapes) == count > 0
    assert len(shapes) == count  # the second run's processor is not AMD's
    monkeypatch.setattr(kernels, "processor", lambda: AMD)
    torch.build(exact, lively_state(exact)).train_step(random_batch(exact), draws(exact), hyper())
    assert len(shapes) == count  # nor is float64 oneDNN's
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
