"""MOCA's codes beside networks of 16 bits in PyTorch: products of bfloat16, digits of float32."""

import numpy as np
import pytest
from conftest import under_test
from support.native import draws, hyper, lively_state, random_batch, tiny_spec

from triptych import backends
from triptych.core.config.spec import MocaSpec
from triptych.core.reference import ops as reference

torch = pytest.importorskip("torch")
if "torch" not in under_test():
    pytest.skip("torch is not under test", allow_module_level=True)
from support import launches  # noqa: E402 - needs PyTorch

from triptych.backends.torch import mixed, ops  # noqa: E402

IMAGES, TOKENS, WIDTH, WORDS, CENTRES = 2, 196, 768, 4096, 1000
"""Sizes of MOCA with ViT-B, and kinds of tokens, so that some codes are large."""
RECIPE = MocaSpec.model_fields["inverse_delta"].default


@pytest.fixture
def on_gpu(monkeypatch):
    """Takes CPU tensors for those of a GPU. Its product adds in float32, too."""
    product = torch.mm
    monkeypatch.setattr(mixed, "_serves", lambda x: True)
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out_dtype: product(a.to(out_dtype), b.to(out_dtype))
    )


def tokens_and_words(common, outlier):
    """Tokens and words as a teacher has them: alike to ``common``, with one large channel."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(WIDTH)
    shared[5] += outlier
    centres = rng.standard_normal((CENTRES, WIDTH)) + common * shared

    def some(count):
        noise = 0.5 * rng.standard_normal((count, WIDTH))
        return centres[rng.integers(0, CENTRES, count)] + noise

    tokens = some(IMAGES * TOKENS).reshape(IMAGES, TOKENS, WIDTH)
    return tokens.astype(np.float32), reference.l2_normalize(some(WORDS)).astype(np.float32)


def exact(tokens, words):
    """The sharpness that a run would have, and codes and differences in float64."""
    inputs = tokens.astype(np.float64), words.astype(np.float64)
    _, difference = reference.soft_assign(*inputs, np.ones(1))
    sharpness = np.float32(RECIPE / difference.mean(keepdims=True))
    return sharpness, *reference.soft_assign(*inputs, sharpness.astype(np.float64))


@pytest.mark.parametrize(("common", "outlier"), [(0, 0), (1, 0), (3, 0), (1, 30)])
def test_codes_have_the_digits_of_float32(on_gpu, common, outlier):
    tokens, words = tokens_and_words(common, outlier)
    sharpness, codes, differences = exact(tokens, words)
    assert codes.max() > 0.05
    inputs = [torch.from_numpy(array) for array in (tokens, words, sharpness)]
    found = mixed.operations(mixed=True).soft_assign(*inputs)
    assert all(each.dtype == torch.float32 for each in found)
    assert np.abs(found[0].numpy() - codes).max() < 1e-4
    assert np.abs(found[1].numpy() - differences).max() < 1e-6
    # One product of bfloat16, without the low parts, is far from it.
    rough, _ = ops.soft_assign(
        *inputs, product=lambda a, b: a.bfloat16().float() @ b.bfloat16().float().mT
    )
    assert np.abs(rough.numpy() - codes).max() > 1e-4


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "float16"])
def test_a_run_has_them_by_its_own_precision(on_gpu, monkeypatch, precision):
    """Two engines of one process do not change each other's."""
    product, calls = mixed._product, []

    def watched(a, b):
        calls.append(a.dtype)
        return product(a, b)

    monkeypatch.setattr(mixed, "_product", watched)
    package = backends.load("torch")
    specs = [tiny_spec(each, "moca_vit") for each in (precision, "bfloat16")]
    engine, _ = (package.build(spec, lively_state(spec)) for spec in specs)
    engine.loss_and_grads(random_batch(specs[0]), draws(specs[0]), hyper())
    assert calls == [torch.float32] * (precision in ("bfloat16", "float16"))


def test_the_cpu_and_older_frameworks_compute_them_in_float32(monkeypatch):
    """Bit for bit; ``_serves`` says so for each reason alone."""
    inputs = [torch.rand(2, 9, 8), torch.rand(7, 8), torch.full((1,), 20.0)]
    want = ops.soft_assign(*inputs)
    for each, other in zip(mixed.operations(mixed=True).soft_assign(*inputs), want, strict=True):
        assert torch.equal(each, other)
    x = type("OnGpu", (), {"is_cuda": True})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert mixed._serves(x) == ("dtype" in torch.ops.aten.mm.overloads())
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.3")
        assert not mixed._serves(x)
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.aten.mm, "overloads", lambda: ["default", "out"])
        assert not mixed._serves(x)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert not mixed._serves(x)


@pytest.mark.skipif(
    "dtype" not in torch.ops.aten.mm.overloads(), reason="no product of bfloat16 in float32"
)
def test_on_a_gpu_they_are_one_product(monkeypatch):
    spec = tiny_spec("bfloat16", "moca_vit")
    engine = backends.load("torch").build(spec, lively_state(spec))
    with launches.on_cuda(engine, monkeypatch):
        inputs = [torch.empty(s, device="cuda:0") for s in ((2, 9, 8), (7, 8), (1,))]
        with launches.Launches() as log:
            codes, _ = engine.ops.soft_assign(*inputs)
        with launches.Launches() as strict:
            ops.soft_assign(*inputs)
    assert codes.shape == (2, 9, 7) and codes.dtype == torch.float32
    assert log.count["mm"] == 1 and log.types["mm"] == {torch.float32}
    assert log.types["cat"] == {torch.bfloat16}
    # Of tokens and of words: two parts, a difference and their row of three.
    more = log.count - strict.count
    del more["device"]  # what fake tensors ask each other
    assert more == {"_to_copy": 4, "sub": 2, "cat": 2}
