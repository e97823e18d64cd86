"""The forms that OneFlow's backend takes on a GPU, computed on the CPU in float64."""

import numpy as np
import pytest
from conftest import assert_close, under_test
from support.native import differentiate, draws, hyper, lively_state, random_batch, tiny_spec

from triptych import backends

pytestmark = pytest.mark.skipif("oneflow" not in under_test(), reason="oneflow is not under test")

RNG = np.random.default_rng(0)


@pytest.fixture
def both(monkeypatch):
    """Calls a function with the forms of the CPU and with those of a GPU, for two results."""
    backends.load("oneflow")
    from triptych.backends.oneflow import layers, sums

    def call(function):
        mine = function()
        with monkeypatch.context() as patch:
            patch.setattr(sums, "plain_forms_serve", lambda x: True)
            patch.setattr(layers, "in_numpy", lambda x: False)
            return mine, function()

    return call


def assert_alike(results, most=1e-12):
    (value, gradients), (other, others) = results
    for mine, plain in zip([value, *gradients], [other, *others], strict=True):
        assert mine.dtype == plain.dtype == np.float64
        assert_close(plain, mine, most)


def test_layer_norm_is_oneflow_s_own(both, monkeypatch):
    import oneflow.nn.functional as F

    from triptych.backends.oneflow import layers

    shapes, native = [], F.layer_norm

    def counted(x, *arguments):
        shapes.append(tuple(x.shape))
        return native(x, *arguments)

    monkeypatch.setattr(layers.F, "layer_norm", counted)
    x, weight, bias = RNG.standard_normal((5, 3, 16)) + 2.0, *RNG.standard_normal((2, 16))
    probe = RNG.standard_normal(x.shape)

    def normalize(x, weight, bias):
        layer = layers.LayerNorm(16, 1e-3).to(dtype=x.dtype)
        object.__setattr__(layer, "_parameters", {"weight": weight, "bias": bias})
        return layer(x)

    assert_alike(both(lambda: differentiate("oneflow", normalize, x, weight, bias, probe=probe)))
    assert shapes == [x.shape]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("row_mean", (7, 5)),
        ("row_sum", (7, 5)),
        ("column_sum", (7, 5)),
        ("centred_rows", (7, 5)),
        ("unit_rows", (7, 5)),
        ("repeat", (7, 1)),
        ("channel_sum", (4, 3, 6, 1)),
        ("like_tokens", (2, 1, 1)),
    ],
)
def test_sums(both, name, shape):
    import oneflow as flow

    from triptych.backends.oneflow import sums

    others = {
        "repeat": (4,),
        "unit_rows": (1e-12,),
        "like_tokens": (flow.zeros(2, 3, 4, dtype=flow.float64),),
    }
    x = RNG.standard_normal(shape)
    value = getattr(sums, name)(flow.tensor(x), *others.get(name, ()))
    probe = RNG.standard_normal(tuple(value.shape))
    function = lambda x: getattr(sums, name)(x, *others.get(name, ()))  # noqa: E731
    assert_alike(both(lambda: differentiate("oneflow", function, x, probe=probe)))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", [(8, 6), (4, 6, 3, 5)])
@pytest.mark.parametrize("tracking", [True, False])
def test_batch_norm(both, shape, ranks, tracking):
    import oneflow as flow

    from triptych.backends.oneflow import layers

    x, probe = RNG.standard_normal((2, *shape)) + 1.0
    weight, bias = RNG.standard_normal((2, 6))
    statistics = []

    def normalize(x, weight, bias):
        layer = layers.BatchNorm(6).to(dtype=x.dtype)
        object.__setattr__(layer, "_parameters", {"weight": weight, "bias": bias})
        layer.virtual_ranks, layer.tracking = ranks, tracking
        y = layer(x)
        with flow.no_grad():
            assert_close(layer(x).numpy(), y.numpy(), 1e-12)
        statistics.append((layer.running_mean.numpy(), layer.running_var.numpy()))
        return y

    assert_alike(both(lambda: differentiate("oneflow", normalize, x, weight, bias, probe=probe)))
    for mine, plain in zip(*statistics, strict=True):
        assert_close(plain, mine, 1e-12)
    assert np.any(statistics[0][0] != 0.0) == tracking


def test_the_mean_of_tokens(both):
    from triptych.backends.oneflow import ops

    x, index = RNG.standard_normal((3, 7, 4)), np.array([1, 4, 5])
    probe = RNG.standard_normal((3, 4))
    function = lambda x: ops.mean_tokens(x, index)  # noqa: E731
    results = both(lambda: differentiate("oneflow", function, x, probe=probe))
    assert_alike(results)
    assert_close(results[1][0], x[:, index].mean(1), 1e-15)


def test_a_buffer_is_updated_as_a_whole(both, monkeypatch):
    import oneflow as flow

    from triptych.backends.oneflow import flat

    monkeypatch.setattr(flat, "BLOCK", 4)
    buffer = flow.arange(10)
    mine, plain = both(lambda: [block.numpy().tolist() for block in flat.blocks(buffer)])
    assert mine == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] and plain == [list(range(10))]


@pytest.mark.parametrize("case", ["moco_v3_vit", "moca_vit", "moco_v2_bottleneck"])
def test_steps(both, case):
    spec = tiny_spec(case=case)

    def steps():
        engine = backends.load("oneflow").build(spec, lively_state(spec))
        for i in range(2):
            values, gradients = engine.trace_step(random_batch(spec, i), draws(spec, i), hyper(i))
        return {**values, **gradients, **engine.export_state()}

    mine, plain = both(steps)
    assert mine.keys() == plain.keys()
    assert any(not np.array_equal(mine[name], plain[name]) for name in mine)
    whole = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in mine.values()))
    for name, x in mine.items():
        np.testing.assert_allclose(plain[name], x, rtol=1e-8, atol=1e-12 * whole, err_msg=name)
