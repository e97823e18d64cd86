"""What a step costs a GPU besides arithmetic, counted where there is none (PyTorch).

The counts are those of small widths; operations depend on the depth alone.
"""

from dataclasses import replace
from math import prod

import numpy as np
import pytest
from conftest import under_test
from support.ferry import Ferry
from support.native import TINY, draws, hyper, lively_state, pairs, random_batch, tiny_spec

from triptych import backends
from triptych.core import config, parameters
from triptych.core.methods import METHODS, staging

torch = pytest.importorskip("torch")
if "torch" not in under_test():
    pytest.skip("torch is not under test", allow_module_level=True)
from support import launches  # noqa: E402 - needs PyTorch


@pytest.fixture(scope="module")
def package():
    return backends.load("torch")


def levels():
    rows = (np.full(3, value, np.float32) for value in (255, 0.5, 0.25))
    return np.stack(list(rows)).reshape(3, 3, 1, 1)


def bytes_batch(spec):
    """A batch as a GPU gets it."""
    batch = random_batch(spec)
    views = tuple((view * 64 + 128).clip(0, 255).astype(np.uint8) for view in batch.views)
    return replace(batch, views=views, levels=levels())


def small(recipe, *overrides):
    """A published recipe in its depth, with the narrowest layers."""
    shared = ["device=cpu", "train.batch_size=16", "train.steps=100", "train.epochs=null"]
    shared += ["threads=1", "precision=bfloat16", "batch_norm.virtual_ranks=1"]
    return config.load(recipe, [*shared, *overrides])


VIT = ("model.width=24", "model.heads=3")
RECIPES = {
    "v3": ("moco_v3/vit_base", *VIT, "model.image_size=32", "method.hidden_dim=16"),
    "moca": (
        *("moca/v1_0_vit_base", *VIT, "model.image_size=96", "train.batch_size=32"),
        *("method.words=40", "method.decoder_width=24", "method.decoder_heads=3"),
    ),
    "v2": ("moco_v2/resnet50", "model.width=8", "model.image_size=32", "method.queue_size=64"),
}
PREDICTED = {
    # The weights are cast for each of the two queries, whose activations take turns in memory.
    ("v3", ()): (1967, 0.12),
    ("moca", ()): (2000, 0.15),
    ("v2", ()): (867, 0.02),
    ("v2", ("batch_norm.virtual_ranks=8",)): (2881, 0.02),
    # One call for all ranks, and small ones for the 106 norms; no weight is cast.
    ("v2", ("batch_norm.virtual_ranks=8", "precision=float32")): (1447, 0.02),
}
"""Operations of a step as foreseen, in bfloat16 by default, and how far the count may be off."""


@pytest.mark.parametrize(("name", "changes"), PREDICTED)
def test_a_step_launches_what_was_counted_and_reads_nothing(package, monkeypatch, name, changes):
    from triptych.backends.torch.resnet import ResNet

    recipe, *overrides = RECIPES[name]
    spec = small(recipe, *overrides, *changes)
    hasten, mixed = ResNet.hasten, spec.precision == "bfloat16"
    # As on a GPU, where float32 has its channels first.
    monkeypatch.setattr(ResNet, "hasten", lambda encoder, last: hasten(encoder, last=mixed))
    engine = package.build(spec, parameters.initial_state(spec))
    launches.fuse_attention(engine)
    engine.context, engine.courier = (
        replace(engine.context, runs_ahead=True),
        Ferry(engine),
    )
    batch, drawn = bytes_batch(spec), METHODS[spec.method.name].draws(spec, 0)
    engine.train_step(batch, drawn, hyper())
    with launches.Launches() as log:
        engine.train_step(batch, drawn, hyper(1))
    expected, tolerance = PREDICTED[name, changes]
    assert abs(sum(log.count.values()) / expected - 1) < tolerance, log.count.most_common(9)
    assert not log.reads
    # The log sees a read: a logged step that waits has one for each metric.
    with log:
        engine.context = replace(engine.context, runs_ahead=False)
        float(engine.train_step(batch, drawn, hyper(2))["loss"])
    assert log.reads


@pytest.mark.parametrize("case", ["moco_v3_vit", "moco_v1_resnet18", "moca_vit"])
def test_nothing_crosses_to_the_gpu_within_a_step(package, monkeypatch, case):
    """What a step needs of the host is there before it begins; without the courier it is not."""
    spec = tiny_spec("bfloat16", case)
    for carried in (True, False):
        engine = package.build(spec, lively_state(spec))
        engine.courier = Ferry(engine) if carried else None
        with launches.on_cuda(engine, monkeypatch):
            step = launches.step_of(engine, draws(spec), hyper())
            staged = engine._staged(step, bytes_batch(spec))
            with launches.Launches() as log:
                launches.forward(engine, step, *staged)
            assert bool(log.copies) != carried, log.copies
            assert not log.reads


@pytest.mark.parametrize("case", ["moco_v3_vit", "moco_v3_resnet18", "moca_vit"])
def test_an_update_stays_on_the_gpu_in_float32(package, monkeypatch, case):
    """AdamW, LARS, AdamW with clipping, and the average of the teacher's weights."""
    engine = package.build(tiny_spec("bfloat16", case), lively_state(tiny_spec("bfloat16", case)))
    with launches.on_cuda(engine, monkeypatch), torch.no_grad():
        for parameter in engine.optimizer.named.values():
            parameter.grad = torch.empty_like(parameter)
        engine.optimizer.step(hyper())
        with launches.Launches() as log:
            engine.optimizer.step(hyper(1))
            engine.model.update_teacher(0.99)
            engine.gradient_norm()
    assert not log.copies and not log.reads
    assert set.union(*log.types.values()) <= {torch.float32, torch.bool}
    assert torch.float32 in log.types["_foreach_lerp_"]


# ----------------------------------------------------------------------------------- bytes an image

CARGO = {
    "moco_v3/vit_base": (2, 8),
    "moco_v2/resnet50": (2, 24),
    "moca/v1_0_vit_base": (2, 20_000),
}
"""Views of an image, and most bytes of its places."""


@pytest.mark.parametrize("recipe", CARGO)
def test_an_image_takes_its_bytes_to_the_device_and_little_more(recipe):
    """Two views of 224 pixels are 301,056 bytes; normalised they were 1,204,224."""
    spec = config.load(recipe, ["train.batch_size=32", "batch_norm.virtual_ranks=1"])
    views, most = CARGO[recipe]
    shape = (32, 3, *spec.model.size)
    batch = replace(random_batch(tiny_spec()), index=np.arange(32), levels=levels())
    batch = replace(batch, views=(np.zeros(shape, np.uint8),) * views)
    model = type("Model", (), {"grid": getattr(spec.model, "grid", None)})
    drawn = METHODS[spec.method.name].draws(spec, 0)
    engine = type("Engine", (), {"ops": None, "model": model, "spec": spec, "tensor": np.asarray})
    step = launches.step_of(engine, drawn, hyper())
    parts = staging.placed(METHODS[spec.method.name], step, batch, [batch])[1]
    courier = Ferry(engine)
    staging.carried(parts, courier)
    pixels = views * prod(shape)
    assert pixels / 32 == 301_056
    assert 0 <= courier.bytes - pixels - levels().nbytes <= 32 * most


# ------------------------------------------------------------------------------------- compilation


GRAPHS = {"moco_v3_vit": 4, "moco_v1_resnet18": 4, "moca_vit": 7}
"""Graphs of two steps, counted. MoCo: encoder and heads, of student and teacher."""


def steps(engine, spec, count=2, first=0):
    """The records of some steps."""
    batches = [random_batch(spec) for _ in range(count)]
    return [
        engine.trace_step(batch, draws(spec), hyper(first + i)) for i, batch in enumerate(batches)
    ]


def assert_equal(found, wanted, tolerance=0.0):
    for record, other in zip(found, wanted, strict=True):
        for arrays, expected in zip(record, other, strict=True):
            for name, array in expected.items():
                bar = tolerance * max(1.0, np.abs(array).max())
                np.testing.assert_allclose(arrays[name], array, rtol=0, atol=bar, err_msg=name)


@pytest.mark.parametrize(
    "case", ["moco_v3_vit", *(pytest.param(c, marks=pytest.mark.soak) for c in [*GRAPHS][1:])]
)
def test_networks_are_one_graph_each_and_compute_the_same(package, case):
    """A break within a graph would raise."""
    graphs = []

    def kept(graph, examples):
        graphs.append(graph)
        return graph.forward

    spec, records = tiny_spec(case=case), []
    for compiler in (None, kept):
        torch._dynamo.reset()
        engine = package.build(spec, lively_state(spec))
        engine.model.compiler = compiler
        records.append(steps(engine, spec))
    assert_equal(*records)
    assert len(graphs) == GRAPHS[case]


@pytest.mark.soak
def test_compiled_networks_compute_the_same_and_a_resumed_run_the_same_bits(package):
    """With PyTorch's own compiler, which takes minutes."""
    spec = tiny_spec()
    compiled = tiny_spec(train={"compile": True})
    engines = [package.build(each, lively_state(spec)) for each in (spec, compiled)]
    assert engines[1].model.compiler == "inductor"
    records = [steps(engine, spec) for engine in engines]
    assert_equal(*records, tolerance=1e-12)
    torch._dynamo.reset()
    resumed = package.build(compiled, lively_state(spec))
    resumed.import_state(engines[1].export_state())
    assert_equal(*(steps(each, spec, 1, 2) for each in (resumed, engines[1])))


# --------------------------------------------------------------------------- gradients in bfloat16

BARS = {
    "moco_v3_vit": (0.15, 0.3),
    "moca_vit": (0.02, 0.05),
    # Batch norm over few values enlarges the rounding, and small tensors drown in it.
    "moco_v3_vit_conv": (0.6, None),
    "moco_v3_resnet18": (0.6, None),
    "moco_v1_resnet18": (0.7, None),
    "moco_v2_bottleneck": (0.45, None),
}
"""Largest relative errors, in the Euclidean norm, of the whole gradient and of any tensor's."""
NOISE = 1e-4
"""A tensor with a smaller share of the gradient has none but for rounding."""


def errors(got, exact):
    """Relative error of the whole gradient, and of each tensor that is more than noise."""
    off = {n: np.linalg.norm(got[n].astype(np.float64) - g) for n, g in exact.items()}
    sizes = {name: np.linalg.norm(gradient) for name, gradient in exact.items()}
    total = np.linalg.norm(list(sizes.values()))
    some = {n: off[n] / size for n, size in sizes.items() if size > NOISE * total}
    return np.linalg.norm(list(off.values())) / total, some


@pytest.mark.parametrize("case", BARS)
def test_gradients_in_bfloat16_are_near_those_in_float64(package, case):
    found = []
    for precision in ("bfloat16", "float64"):
        changes = {"train": {"batch_size": 16}}
        if "queue_size" in TINY[case]["method"]:
            changes |= {"method": {"queue_size": 64}, "batch_norm": {"virtual_ranks": 1}}
        spec = tiny_spec(precision, case, **changes)
        engine = package.build(spec, lively_state(spec))
        found.append(engine.loss_and_grads(pairs(spec), draws(spec), hyper())[1])
    whole, by_name = errors(*found)
    largest, of_tensor = BARS[case]
    assert 1e-3 < whole < largest
    assert of_tensor is None or max(by_name.values()) < of_tensor, by_name


def test_a_gradient_that_misses_a_part_is_off():
    exact = {"a": np.ones(100), "b": np.full(4, 0.1), "c": np.full(4, 1e-9)}
    whole, by_name = errors({**exact, "b": np.zeros(4), "c": np.ones(4) * 1e-8}, exact)
    assert whole == pytest.approx(0.02, rel=0.01) and by_name == {"a": 0.0, "b": 1.0}
