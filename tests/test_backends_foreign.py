"""Keys that training needs to go on from states of other systems, on every backend."""

import importlib
from functools import cache, partial

import numpy as np
import pytest
from autograd import elementwise_grad
from conftest import assert_close
from support.marks import marked
from support.native import differentiate, draws, hyper, lively_state, random_batch, tiny_spec

from triptych.core import reference
from triptych.core.config.spec import BatchNormSpec
from triptych.core.contracts import ALONE
from triptych.core.parity.compare import certain, noise_names
from triptych.core.reference import layers

SMALL = {"name": "resnet", "width": 2, "stem": "small", "image_size": [8, 12]}
SYSTEMS = {
    "libai": (
        "moco_v3_vit",
        {
            "model": {"layer_norm_eps": 1e-5, "mlp_ratio": 2.125},
            "method": {"last_norm_affine": True, "predictor_hidden_dim": 40},
            "optim": {"name": "adamw", "decay_on": "matrices"},
        },
    ),
    "paddlefleetx": (
        "moco_v2_bottleneck",
        {
            "model": {**SMALL, "block": "bottleneck", "depths": [2, 1, 2, 1]},
            "method": {"teacher_statistics": "averaged"},
            "batch_norm": {"running_variance": "biased"},
        },
    ),
    "mmpretrain": (
        "moco_v3_resnet18",
        {
            "model": {**SMALL, "block": "basic", "depths": [2, 1, 1, 1]},
            "method": {"teacher_statistics": "copied"},
            "optim": {"form": "mmpretrain"},
        },
    ),
}


def five_steps(package, system):
    """The start, the losses, the gradients by name and step, and the end of a run."""
    case, sections = SYSTEMS[system]
    spec = tiny_spec(case=case, **sections)
    engine = package.build(spec, lively_state(spec))
    start, losses, record = engine.export_state(), [], {}
    for step in range(5):
        values, gradients = engine.trace_step(
            random_batch(spec, step), draws(spec, step), hyper(step)
        )
        losses.append(values["loss"])
        record |= {f"grad/{name}/step{step}": value for name, value in gradients.items()}
    return start, losses, record, engine.export_state()


@pytest.fixture(scope="module")
def references():
    """The run of the reference, computed once for all backends."""
    return cache(partial(five_steps, reference))


@pytest.mark.parametrize("system", marked(SYSTEMS, ("paddlefleetx",), pytest.mark.one_backend))
def test_five_steps_of_each_system(backend, system, references):
    _, losses, _, got = five_steps(backend, system)
    start, want_losses, record, want = references(system)
    assert_close(losses, want_losses, 1e-10, "losses")
    noise = tuple(name.removeprefix("student.") for name in noise_names(record, "float64"))
    assert set(got) == set(want) and len(noise) < len(want) / 10
    for name in (name for name in want if not name.endswith(noise)):
        before, after, found = (
            certain(f"state/{name}/", state[name]) for state in (start, want, got)
        )
        if np.abs(after - before).max() > 1e-4:
            assert_close(found - before, after - before, 1e-10, name)


def batch_norm(backend, ranks, biased):
    """A batch norm of four channels in float64, its canonical tensors, and its kind."""
    name = backend.__name__.rpartition(".")[2]
    framework = importlib.import_module(name)
    module = importlib.import_module(f"{backend.__name__}.layers")
    layer = module.BatchNorm(4)
    layer.to(dtype=framework.float64)
    if name == "paddle":  # which converts integers, too
        layer.register_buffer("num_batches_tracked", framework.zeros([], "int64"))
    spec = BatchNormSpec(virtual_ranks=ranks, running_variance="biased" if biased else "unbiased")
    module.set_batch_norm(framework.nn.Sequential(layer), spec, ALONE.norms)
    values = {f"n.{key}": np.array(tensor.numpy()) for key, tensor in layer.state_dict().items()}
    return name, layer, values, spec


@pytest.mark.parametrize("shape", [(8, 4), (8, 4, 3, 5)])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_the_running_variance_is_the_one_that_is_asked_for(backend, shape, ranks, biased):
    rng = np.random.default_rng(5)
    x, probe = rng.standard_normal((2, *shape))
    name, layer, values, spec = batch_norm(backend, ranks, biased)
    norms = layers.Norms.of(spec, 1, ALONE.norms)
    # The second pass comes before the backward pass of the first, as with two views of an image.
    value, (grad,) = differentiate(name, lambda leaf: layer(leaf) + layer(leaf), x, probe=probe)
    want = 2.0 * layers.batch_norm(values, "n", x, norms)
    want_grad = elementwise_grad(
        lambda a: np.sum(2.0 * layers.batch_norm(dict(values), "n", a, norms) * probe)
    )(x)
    layers.batch_norm(values, "n", x, norms)
    assert_close(value, want, 1e-12)
    assert_close(grad, want_grad, 1e-12)
    for key, tensor in layer.state_dict().items():
        assert_close(tensor.numpy(), values[f"n.{key}"], 1e-12, key)
    first = x[: 8 // ranks].swapaxes(0, 1).reshape(4, -1)
    variance = first.var(axis=1, ddof=0 if biased else 1)
    assert_close(layer.running_var.numpy(), 0.81 + (1 - 0.81) * variance, 1e-12)


@pytest.mark.parametrize("case", ["moco_v1_resnet18", "moco_v3_resnet18"])
@pytest.mark.parametrize("kind", ["averaged", "copied"])
def test_the_teachers_statistics_follow_the_students(backend, case, kind):
    spec = tiny_spec(case=case, method={"teacher_statistics": kind})
    state = lively_state(spec)
    for name in state:
        if name.startswith("student.") and name.endswith("num_batches_tracked"):
            state[name] = np.int64(7)
    for package in (backend, reference):
        engine = package.build(spec, state)
        start = engine.export_state()
        engine.model.update_teacher(0.9)
        after = engine.export_state()
        for name in (n for n in after if n.startswith("teacher.")):
            source = start[name.replace("teacher.", "student.", 1)]
            want = 0.9 * start[name] + 0.1 * source
            if name.endswith("num_batches_tracked"):
                want = 7 if kind == "copied" else 0
            elif "running_" in name and kind == "copied":
                want = source
            np.testing.assert_allclose(after[name], want, rtol=0, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("case", ["moco_v1_resnet18", "moco_v3_resnet18"])
def test_the_teacher_follows_statistics_that_the_step_has_moved(backend, case):
    """The student's passes come first, then the update of the teacher, then the keys."""
    spec = tiny_spec(case=case, method={"teacher_statistics": "copied"})
    given, batch = draws(spec), random_batch(spec)
    engine, by_hand = (backend.build(spec, lively_state(spec)) for _ in range(2))
    engine.loss_and_grads(batch, given, hyper())
    views = [by_hand.tensor(view) for view in batch.views]
    both = case.startswith("moco_v3")
    student, teacher = (views, views) if both else (views[:1], views[1:])
    if not both:
        teacher = [by_hand.ops.gather_rows(views[1], given["shuffle_perm"])]
    for branch, seen in (("student", student), ("teacher", teacher)):
        for view in seen:
            by_hand.model.projected(branch, by_hand.model.encoded(branch, view))
        if branch == "student":
            by_hand.model.update_teacher(hyper().ema)
    want = by_hand.export_state()
    for name, array in engine.export_state().items():
        np.testing.assert_allclose(array, want[name], rtol=1e-13, atol=1e-14, err_msg=name)
