"""Layers for maps with channels last: PyTorch's numbers, with all digits of float32."""

from collections import Counter

import numpy as np
import pytest
from conftest import under_test
from support.native import draws, hyper, lively_state, random_batch, tiny_spec

from triptych import backends
from triptych.core.contracts import Group

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif("torch" not in under_test(), reason="torch is not under test")


def last(*shape, dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=dtype or torch.float32)
    return x.contiguous(memory_format=torch.channels_last)


def batch_norm(width, ranks, biased=False, dtype=None):
    from triptych.backends.torch.layers import BatchNorm

    norm = BatchNorm(width).to(dtype or torch.float32)
    norm.virtual_ranks, norm.biased = ranks, biased
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1.0, 2.0, width))
        norm.bias.copy_(torch.linspace(1.0, -1.0, width))
    return norm


def results(norm, x, probe):
    """Output, gradients and running statistics, as float64."""
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(probe)
    found = {"y": y, "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    found |= {"mean": norm.running_mean, "variance": norm.running_var}
    return {name: value.detach().double().numpy() for name, value in found.items()}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (10, 5, 7, 13), (4, 3, 2, 3), (5, 2, 11, 11)])
def test_a_norm_keeps_the_digits_of_float32(shape, ranks, biased):
    """Also of parts of different sizes. PyTorch's own norm is 2e-5 off here."""
    from triptych.backends.torch import maps

    x = last(*shape) + last(1, shape[1], 1, 1, seed=1)
    probe = last(*shape, seed=2) + 1.0
    assert maps.serve(x)
    got = results(batch_norm(shape[1], ranks, biased), x, probe)
    wide = batch_norm(shape[1], ranks, biased, torch.float64)
    want = results(wide, x.double().contiguous(), probe.double().contiguous())
    for name, value in want.items():
        allowed = 2e-5 if name == "weight" else 1e-6  # a sum that cancels
        assert np.abs(got[name] - value).max() < allowed * np.abs(value).max(), name


def test_statistics_far_from_zero_keep_the_digits_of_float32():
    from triptych.backends.torch import maps

    x = last(8, 16, 56, 56) + 100.0 * last(1, 16, 1, 1, seed=1)
    wide = x.double()
    mean, variance = (m.double() for m in maps.statistics(x))
    torch.testing.assert_close(mean, wide.mean((0, 2, 3)), rtol=3e-7, atol=0.0)
    expected = wide.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(variance, expected, rtol=1e-5, atol=0.0)


def test_statistics_of_a_group_keep_the_digits_of_float32():
    from triptych.backends.torch.layers import joint_statistics

    x = last(8, 64, 112, 112) + last(1, 64, 1, 1, seed=1)
    mean, variance, count = joint_statistics(x, Group())
    wide = x.double().contiguous()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        variance.double(), wide.var((0, 2, 3), unbiased=False), rtol=1e-6, atol=0.0
    )
    assert int(count) == 8 * 112 * 112


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_a_pointwise_convolution_is_a_product(size, stride, monkeypatch):
    from triptych.backends.torch import maps

    layer = maps.Conv2d(6, 10, 1, stride, bias=False).double()
    x, found = last(3, 6, *size, dtype=torch.float64), []
    calls, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: calls.append(a) or linear(*a))
    for order in (torch.channels_last, torch.contiguous_format):
        images = x.clone(memory_format=order).requires_grad_()
        y = layer(images)
        assert y.is_contiguous(memory_format=order)
        layer.zero_grad()
        y.square().sum().backward()
        found.append((y, images.grad, layer.weight.grad))
    assert len(calls) == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_seen(value):
    norm = batch_norm(4, 1)
    x = last(2, 4, 6, 6)
    x[1, 2, 3, 3] = value
    y = norm(x)
    assert y[:, 2].isnan().any() and y[:, [0, 1, 3]].isfinite().all()


def test_a_single_value_for_each_channel_is_refused():
    with pytest.raises(ValueError, match="more than 1 value"):
        batch_norm(4, 2)(last(2, 4, 1, 1))


def test_a_step_takes_no_other_layers():
    """Each map of a ResNet has its channels last, in both passes."""
    from triptych.backends.torch.layers import BatchNorm
    from triptych.backends.torch.resnet import ResNet

    spec = tiny_spec("float32", "moco_v2_bottleneck")
    engine = backends.load("torch").build(spec, lively_state(spec))
    student, _ = (m for m in engine.model.modules() if isinstance(m, ResNet))
    with torch.profiler.profile() as profile:
        engine.train_step(random_batch(spec), draws(spec), hyper())
    count = Counter(event.name for event in profile.events())
    norms = sum(isinstance(module, BatchNorm) for module in student.modules())
    assert count["BatchNorm"] == 2 * norms and count["BatchNormBackward"] == norms
    assert not count["aten::_slow_conv2d_forward"] and not count["aten::cudnn_batch_norm"]
    assert count["aten::mm"] > norms
