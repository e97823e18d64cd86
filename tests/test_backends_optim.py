"""Update rules: NumPy's against the golden micro-runs, every backend's against NumPy's."""

import json
import math

import numpy as np
import pytest
from conftest import relative_error
from support.golden_weights import GOLDEN
from support.marks import marked
from support.native import draws, hyper, lively_state, random_batch, tiny_spec

from triptych.core.config.spec import RunSpec
from triptych.core.optim import groups
from triptych.core.parameters import table
from triptych.core.reference import optim

NPZ = np.load(GOLDEN / "optimizers.npz")
RUNS = json.loads((GOLDEN / "optimizers.json").read_text())["runs"]
TENSORS = sorted({key.split("/")[1] for key in NPZ.files if key.startswith("init/")})


def golden_steps(run, tensor, update=lambda rule, *arguments, **rates: rule(*arguments, **rates)):
    """Each step's value by our rule, and the recorded one."""
    settings = dict(RUNS[run])
    value = NPZ[f"init/{tensor}"].astype(np.float64).copy()
    moments = [np.zeros_like(value), np.zeros_like(value)]
    rates = {"lr": settings["lr"], "weight_decay": settings["wd"]}
    for step in range(3):
        key = f"grad/{tensor}/step{step}"
        if key in NPZ:
            if run == "adamw":
                options = {"count": step + 1, "betas": settings["betas"], "eps": settings["eps"]}
                update(optim.adamw, value, NPZ[key], *moments, **options, **rates)
            elif run == "sgd":
                options = {"momentum": settings["momentum"]}
                update(optim.sgd, value, NPZ[key], moments[0], **options, **rates)
            else:
                options = {
                    "momentum": settings["momentum"],
                    "trust_coefficient": settings["trust"],
                }
                update(optim.lars, value, NPZ[key], moments[0], **options, **rates)
        yield value, NPZ[f"{run}/{tensor}/after_step{step}"]


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("run", RUNS)
def test_rules_follow_the_golden_runs(run, tensor):
    for value, want in golden_steps(run, tensor):
        np.testing.assert_allclose(value, want, rtol=1e-13, atol=1e-15)


def test_the_golden_runs_cover_the_exceptions():
    assert set(RUNS) == {"lars_wd", "lars_nowd", "adamw", "sgd"}
    assert {"bias1", "w2", "w4", "w2_zero_param", "w2_zero_grad", "w2_nograd"} <= set(TENSORS)
    assert not any(key.startswith("grad/w2_nograd") for key in NPZ.files)


@pytest.mark.parametrize(
    ("run", "tensor", "change"),
    [
        ("lars_wd", "bias1", {"weight_decay": 0.2}),
        ("lars_wd", "w2", {"weight_decay": 0.2}),
        ("lars_wd", "w4", {"trust_coefficient": 0.002}),
        ("sgd", "bias1", {"weight_decay": 0.2}),
        ("sgd", "w2", {"momentum": 0.8}),
        ("adamw", "bias1", {"weight_decay": 0.2}),
    ],
)
def test_a_changed_rate_shows_where_it_acts(run, tensor, change):
    def changed(rule, *arguments, **rates):
        rule(*arguments, **{**rates, **change})

    gaps = [np.abs(value - want).max() for value, want in golden_steps(run, tensor, changed)]
    # LARS leaves vectors alone: neither decayed nor scaled.
    assert (max(gaps) < 1e-14) == (run == "lars_wd" and tensor == "bias1")


def test_mmpretrains_lars_by_hand():
    """Two steps of a matrix of norm 5 and of a vector, at rates 0.5 and 0.25."""
    matrix, vector = np.array([[3.0, 4.0]]), np.array([3.0, 4.0])
    gradients = np.array([[0.0, 2.0]]), np.array([0.0, 2.0])
    buffers = np.zeros_like(matrix), np.zeros_like(vector)
    options = {"momentum": 0.9, "trust_coefficient": 0.1}
    for value, gradient, buffer in zip((matrix, vector), gradients, buffers, strict=True):
        decay = 0.2 if value.ndim > 1 else 0.0
        optim.mmpretrain_lars(value, gradient, buffer, lr=0.5, weight_decay=decay, **options)
    ratio = 0.1 * 5 / (2 + 0.2 * 5 + 1e-8)
    np.testing.assert_allclose(buffers[0], [[0.5 * ratio * 0.6, 0.5 * ratio * 2.8]], rtol=1e-15)
    np.testing.assert_allclose(matrix, [[3, 4]] - buffers[0], rtol=1e-15)
    np.testing.assert_array_equal(vector, [3, 3])
    optim.mmpretrain_lars(vector, gradients[1], buffers[1], lr=0.25, weight_decay=0.0, **options)
    np.testing.assert_allclose(vector, [3, 3 - 0.9 - 0.5], rtol=1e-15)


def test_the_forms_of_lars_differ_where_the_rate_changes():
    """Without decay and at a constant rate, mmpretrain's buffer is MoCo v3's times the rate."""
    rng = np.random.default_rng(4)
    gradients = rng.standard_normal((4, 3, 5))
    options = {"momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 0.02}
    for lrs, equal in (([0.3] * 4, True), ([0.1, 0.2, 0.3, 0.4], False)):
        values, buffers = np.ones((2, 3, 5)), np.zeros((2, 3, 5))
        for lr, gradient in zip(lrs, gradients, strict=True):
            optim.lars(values[0], gradient, buffers[0], lr=lr, **options)
            optim.mmpretrain_lars(values[1], gradient, buffers[1], lr=lr, **options)
        assert np.allclose(values[0], values[1], rtol=0, atol=1e-8) == equal
        assert np.allclose(buffers[0] * lrs[-1], buffers[1], rtol=0, atol=1e-8) == equal


def rates(step):
    """A warm-up from 0, then a cosine; decay 0 at first."""
    lr = 0.05 * min(step / 4, 0.5 * (1 + math.cos(math.pi * (step - 4) / 12)))
    return hyper(step, lr=lr, weight_decay=0.01 if step > 3 else 0.0)


OPTIONS = {
    "adamw": {"name": "adamw"},
    "sgd": {"name": "sgd", "momentum": 0.8},
    "lars": {"name": "lars", "trust_coefficient": 0.02},
    "lars clipped": {"name": "lars", "clip_norm": 0.5},
    "lars of mmpretrain": {"name": "lars", "form": "mmpretrain", "trust_coefficient": 0.02},
    "sgd clipped": {"name": "sgd", "clip_norm": 0.5},
}
FORMS = ("lars clipped", "lars of mmpretrain", "sgd clipped")


def gaps_after(backend, options, steps, rule_options=None):
    """Largest relative error of any value or moment, the rule being fed the engine's gradients."""
    spec = tiny_spec(case="moco_v1_resnet18", model={"zero_init_residual": True})
    spec = RunSpec.model_validate({**spec.model_dump(), "optim": options})
    state = lively_state(spec)
    for name in state:
        # Gradients of exactly zero (behind a gain of zero), and a tensor of zeros with a gradient.
        if name.endswith(("layer1.0.bn2.weight", "layer2.0.downsample.0.weight")):
            state[name] = np.zeros_like(state[name])
    engine = backend.build(spec, state)
    values = {name: array.astype(np.float64) for name, array in state.items()}
    gradients: dict[str, np.ndarray] = {}
    trainable = [param.name for param in table(spec) if param.trainable]
    changed = type(spec.optim).model_validate({**spec.optim.model_dump(), **(rule_options or {})})
    members = groups.assign({name: values[name] for name in trainable}, spec)
    rule = optim.Optimizer(changed, values, lambda: gradients, members)
    for step in range(steps):
        _, found = engine.trace_step(random_batch(spec, step), draws(spec, step), rates(step))
        gradients.update(found)
        rule.step(rates(step))
    after = engine.export_state()
    want = {**{name: values[name] for name in trainable}, **rule.moments}
    assert int(after["optimizer.step"]) == rule.count == steps
    assert {n for n in after if n.startswith("optimizer.")} == {*rule.moments, "optimizer.step"}
    return {name: relative_error(after[name], want[name]) for name in want}


@pytest.mark.one_backend
@pytest.mark.parametrize("options", OPTIONS)
def test_sixteen_steps_with_a_changing_rate(backend, options):
    gaps = gaps_after(backend, OPTIONS[options], 16)
    worst = max(gaps, key=gaps.get)
    assert gaps[worst] < 1e-10, (worst, gaps[worst])


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("options", "change"),
    [
        ("lars", {"trust_coefficient": 0.0201}),
        ("lars of mmpretrain", {"form": "moco_v3"}),
        ("sgd", {"momentum": 0.801}),
        ("adamw", {"eps": 1.1e-8}),
    ],
)
def test_the_comparison_sees_another_rule(backend, options, change):
    assert max(gaps_after(backend, OPTIONS[options], 5, change).values()) > 1e-8


def mixed_group(name, ndim, spec):
    """Groups that follow no rule: neighbours differ in scale and decay."""
    return groups.Group(scale=(0.5, 1.0, 2.0)[len(name) % 3], decay=(None, 0.0, 0.02)[ndim % 3])


@pytest.mark.parametrize("options", marked(OPTIONS, FORMS, pytest.mark.one_backend))
def test_every_rule_honours_groups(backend, options, monkeypatch):
    monkeypatch.setattr(groups, "group", mixed_group)
    gaps = gaps_after(backend, OPTIONS[options], 3)
    worst = max(gaps, key=gaps.get)
    assert gaps[worst] < 1e-11, (worst, gaps[worst])
