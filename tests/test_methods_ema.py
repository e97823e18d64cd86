"""The moving average of the weights in fine-tuning: timm's rule and mmengine's."""

import importlib
import json

import numpy as np
import pytest
from conftest import assert_close
from support.golden_weights import GOLDEN, RULES, normal
from support.native import tiny_spec

from triptych.core import config
from triptych.core.config.spec import RunSpec
from triptych.core.optim.plan import Plan

NPZ = np.load(GOLDEN / "eval" / "finetune_batch.npz")
NAMES = json.loads((GOLDEN / "eval" / "finetune_batch.json").read_text())["ema"]["states"]
KINDS = {
    "timm_ema_v1_0.9": ("averaged", 0.9),
    "timm_ema_v2_0.99996": ("averaged", 0.99996),
    "mm_ema_4e-5": ("copied", 1 - 4e-5),
    "mm_ema_0.1": ("copied", 0.9),
}


def initial(name):
    """The first value of a tensor."""
    shape = NPZ[f"ema/timm_ema_v1_0.9/{name}/step0"].shape
    if name.endswith("num_batches_tracked"):
        return np.zeros((), np.int64)
    if name.endswith(("running_mean", "running_var")):
        return np.full(shape, float(name.endswith("var")))
    rule = "bias:0.02z" if name.endswith("bias") else "norm_weight:1+0.1z"
    rule = "matrix" if name == "0.weight" else rule
    return RULES[rule](f"ema.{name}", f"ema.{name}", shape)


def followed(name, step):
    """The student's value after a step."""
    first = initial(name)
    if name.endswith("num_batches_tracked"):
        return first + step + 1
    return first + 0.1 * (step + 1) * normal(f"ema.{name}.s{step}", first.shape)


def pair(backend):
    """A pair of a linear layer and a batch norm, and the slots of student and teacher."""
    name = backend.__name__.rpartition(".")[2]
    framework = importlib.import_module(name)
    layers, methods, state = (
        importlib.import_module(f"{backend.__name__}.{part}")
        for part in ("layers", "methods", "state")
    )

    def branch():
        module = framework.nn.Sequential(framework.nn.Linear(3, 4), layers.BatchNorm(4))
        module.to(dtype=framework.float64)
        if name == "paddle":  # which converts integers, too
            module[1].register_buffer("num_batches_tracked", framework.zeros([], "int64"))
        return module

    both = methods.Pair(branch(), branch())
    if name == "oneflow":
        both.pack(tiny_spec(case="moco_v3_vit"))
    slots = []
    for module in (both.student, both.teacher):
        transposed = [layers.linear_weights(module)] if name == "paddle" else []
        slots.append(state.slots(module.state_dict(), *transposed))
    return both, *slots


@pytest.mark.parametrize("kind", KINDS)
def test_averages_follow_the_golden_ones(backend, kind):
    both, student, teacher = pair(backend)
    both.statistics, momentum = KINDS[kind]
    for name in NAMES:
        teacher[name].write(initial(name))
    for step in range(3):
        for name in NAMES:
            student[name].write(followed(name, step))
        # mmengine's first update copies. The plan says so by a momentum of 0.
        both.update_teacher(0.0 if kind.startswith("mm") and step == 0 else momentum)
        for name in NAMES:
            want = NPZ[f"ema/{kind}/{name}/step{step}"]
            assert_close(teacher[name].read(), want, 1e-13, f"{name} after step {step}")


def test_statistics_stay_the_teachers_own_in_pretraining(backend):
    both, student, teacher = pair(backend)
    for name in NAMES:
        student[name].write(followed(name, 0))
    before = {name: teacher[name].read() for name in NAMES}
    both.update_teacher(0.5)
    changed = {name for name in NAMES if not np.array_equal(teacher[name].read(), before[name])}
    assert changed == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(("rule", "first"), [("timm", 0.99996), ("mmengine", 0.0)])
def test_the_first_update_of_mmengines_rule_copies(rule, first):
    base = config.load("moco_v3/digits", ["augment.view2=[]"]).model_dump()
    base["method"] = {"name": "finetune", "classes": 10, "momentum": 0.99996, "ema_rule": rule}
    plan = Plan(RunSpec.model_validate(base), 10)
    assert [plan.hyper(step).ema for step in (0, 1, 2)] == [first, 0.99996, 0.99996]


def test_without_a_teacher_the_momentum_is_zero():
    base = config.load("moco_v3/digits", ["augment.view2=[]"]).model_dump()
    for method in ("linear", "finetune"):
        base["method"] = {"name": method, "classes": 10}
        assert Plan(RunSpec.model_validate(base), 10).hyper(3).ema == 0.0
