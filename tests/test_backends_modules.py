"""Every module of every backend against the float64 NumPy reference."""

import importlib
from functools import cache

import numpy as np
import pytest
from autograd import elementwise_grad
from conftest import TOLERANCE, assert_close
from support.native import differentiate, lively_state, tiny_spec

from triptych.core import parameters
from triptych.core.reference import encoders, layers
from triptych.core.reference.layers import TRAINING, Norms

SPEC = tiny_spec()
TOKENS = (8, 7, SPEC.model.width)
B = "student.encoder.blocks.0"


def norm(values, x):
    return layers.layer_norm(values, "student.encoder.norm", x, SPEC.model.layer_norm_eps)


def attention(values, x):
    return encoders.attention(values, f"{B}.attn", x, SPEC.model.heads)


def feed_forward(values, x):
    hidden = layers.gelu(layers.linear(values, f"{B}.mlp.fc1", x))
    return layers.linear(values, f"{B}.mlp.fc2", hidden)


def block(values, x):
    return encoders.block(values, B, x, SPEC.model)


def class_token(values, x):
    return encoders.vit(values, "student.encoder", x, SPEC.model)["final"][:, 0]


def batch_norm(values, x):
    return layers.batch_norm(values, "student.projector.1", x, TRAINING)


def projector(values, x):
    plan = parameters.parts(SPEC).projector
    return layers.head(values, "student.projector", x, plan, TRAINING)


def predictor(values, x):
    plan = parameters.parts(SPEC).predictor
    return layers.head(values, "student.predictor", x, plan, TRAINING)


def resnet(case):
    """A whole encoder's feature, with the norms of its case."""
    spec = tiny_spec(case=case)
    norms = Norms(True, spec.batch_norm.virtual_ranks)

    def function(values, x):
        return encoders.encode(values, "student.encoder", x, spec.model, norms)["final"][:, 0]

    return function


def residual_block(case, name):
    found = {each.name: each for each in parameters.blocks(tiny_spec(case=case).model)}

    def function(values, x):
        return encoders.residual_block(values, "student.encoder", found[name], x, TRAINING)

    return function


def conv_stem(values, x):
    return encoders.conv_stem(values, "student.encoder", x, tiny_spec(case=CONV).model, TRAINING)


def norm_of_two_ranks(values, x):
    return layers.batch_norm(values, "student.encoder.bn1", x, Norms(True, 2))


def head(case):
    plan = parameters.parts(tiny_spec(case=case)).projector
    return lambda values, x: layers.head(values, "student.projector", x, plan, TRAINING)


VIT, CONV, RESNET = "moco_v3_vit", "moco_v3_vit_conv", "moco_v3_resnet18"
RANKS, DEEP = "moco_v1_resnet18", "moco_v2_bottleneck"
MODULES = {
    "layer_norm": (VIT, "encoder.norm", norm, TOKENS),
    "layer_norm_far": (VIT, "encoder.norm", norm, TOKENS),
    "attention": (VIT, "encoder.blocks.0.attn", attention, TOKENS),
    "mlp": (VIT, "encoder.blocks.0.mlp", feed_forward, TOKENS),
    "block": (VIT, "encoder.blocks.0", block, TOKENS),
    "encoder": (VIT, "encoder", class_token, (8, 3, 8, 12)),
    "batch_norm": (VIT, "projector.1", batch_norm, (8, SPEC.method.hidden_dim)),
    "projector": (VIT, "projector", projector, (8, SPEC.model.width)),
    "predictor": (VIT, "predictor", predictor, (8, SPEC.method.output_dim)),
    "conv_stem": (CONV, "encoder.patch_embed", conv_stem, (8, 3, 32, 48)),
    "conv_encoder": (CONV, "encoder", resnet(CONV), (8, 3, 32, 48)),
    "block_of_two": (RESNET, "encoder.layer1.1", residual_block(RESNET, "layer1.1"), (8, 4, 5, 7)),
    "block_strided": (RESNET, "encoder.layer2.0", residual_block(RESNET, "layer2.0"), (8, 4, 5, 7)),
    "bottleneck": (DEEP, "encoder.layer1.0", residual_block(DEEP, "layer1.0"), (8, 4, 5, 7)),
    "bottleneck_strided": (
        DEEP,
        "encoder.layer2.0",
        residual_block(DEEP, "layer2.0"),
        (8, 16, 6, 9),
    ),
    "resnet18": (RESNET, "encoder", resnet(RESNET), (8, 3, 40, 56)),
    "bottlenecks": (DEEP, "encoder", resnet(DEEP), (8, 3, 16, 24)),
    "virtual_ranks": (RANKS, "encoder.bn1", norm_of_two_ranks, (8, 4, 8, 12)),
    "resnet18_virtual_ranks": (RANKS, "encoder", resnet(RANKS), (8, 3, 8, 12)),
    "head_v1": (RANKS, "projector", head(RANKS), (8, 32)),
    "head_v2": (DEEP, "projector", head(DEEP), (8, 128)),
}
FACTOR = {"layer_norm_far": 20, "resnet18": 10, "bottlenecks": 100, "resnet18_virtual_ranks": 10}
"""Wider tolerances: the error of a norm's input at mean 20 is that of the input's own last bit, and
norms over few values multiply what came in."""


def submodule(module, path):
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


@pytest.fixture(scope="module", params=["float64", "float32"])
def engines(backend, request):
    """Makes an engine of a case, once."""

    @cache
    def make(case):
        spec = tiny_spec(request.param, case)
        return backend.build(spec, lively_state(spec))

    return make


@pytest.mark.parametrize("case", MODULES)
def test_module(engines, backend_name, case, monkeypatch):
    of, path, function, shape = MODULES[case]
    engine = engines(of)
    precision = engine.context.precision
    rng = np.random.default_rng(1)  # its own: no test changes what another draws
    x = rng.standard_normal(shape).astype(precision)
    if case == "layer_norm_far":
        # A mean far above the spread: forms built on E[x^2] - E[x]^2 lose their digits here.
        x = x + np.array(20.0, precision)
    values = {n: a.astype(np.float64) for n, a in engine.export_state().items()}
    want = function(dict(values), x.astype(np.float64))
    probe = rng.standard_normal(want.shape).astype(precision)
    want_grad = elementwise_grad(lambda a: np.sum(function(dict(values), a) * probe))(
        x.astype(np.float64)
    )
    module = submodule(engine.model.student, path)
    if case == "virtual_ranks":
        # PyTorch's network hands this norm the images of the ranks in turn. Here they are not.
        monkeypatch.setattr(module, "alternating", False, raising=False)
    value, (grad,) = differentiate(backend_name, module, x, probe=probe)
    allowed = TOLERANCE[precision]["op"] * FACTOR.get(case, 1)
    assert value.dtype == precision
    assert_close(value, want, allowed, case)
    assert_close(grad, want_grad, allowed, f"gradient of {case}")


def pool_of(backend_name):
    """What a backend's residual networks pool with."""
    if backend_name == "paddle":
        return importlib.import_module("triptych.backends.paddle.layers").max_pool
    return importlib.import_module(f"{backend_name}.nn").MaxPool2d(3, 2, 1)


def test_of_equal_values_in_a_pool_the_first_has_the_gradient(backend_name):
    rng = np.random.default_rng(2)
    x, probe = rng.integers(0, 3, (2, 3, 9, 12)) * 1.0, rng.standard_normal((2, 3, 5, 6))
    value, (grad,) = differentiate(backend_name, pool_of(backend_name), x, probe=probe)
    np.testing.assert_array_equal(value, layers.max_pool(x))
    want = elementwise_grad(lambda a: np.sum(layers.max_pool(a) * probe))(x)
    assert_close(grad, want, 1e-12)


def test_a_pool_passes_nan_on():
    x = np.ones((1, 1, 5, 5))
    x[0, 0, 2, 2] = np.nan
    assert np.isnan(layers.max_pool(x)).sum() == 1
