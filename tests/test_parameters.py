"""Canonical names, shapes and initial values (MoCo v3's own bounds)."""

import math

import numpy as np
import pytest
from native import tiny_spec

from triptych.core import parameters
from triptych.core.config.spec import RunSpec


def recipe(name, **method):
    return RunSpec.model_validate(
        {
            "model": {"name": name},
            "method": {"name": "moco_v3", **method},
            "train": {"steps": 1, "batch_size": 2},
        }
    )


def by_name(spec):
    return {p.name: p for p in parameters.table(spec)}


BOUNDS = {
    "student.encoder.blocks.3.attn.qkv.weight": 0.088388,
    "student.encoder.blocks.3.attn.proj.weight": 0.088388,
    "student.encoder.blocks.3.mlp.fc1.weight": 0.055902,
    "student.encoder.blocks.3.mlp.fc2.weight": 0.055902,
    "student.encoder.patch_embed.proj.weight": 0.072169,
    "student.projector.0.weight": 0.05103,
    "student.projector.3.weight": 0.015625,
    "student.predictor.0.weight": 0.0625,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_uniform_bounds_of_vit_small(name):
    param = by_name(recipe("vit_small"))[name]
    assert param.init.kind == "uniform"
    assert param.init.value == pytest.approx(BOUNDS[name], rel=1e-4)
    value = parameters.initial_value(param, seed=0)
    assert np.abs(value).max() <= param.init.value
    # A uniform variable's standard deviation is its bound over sqrt(3).
    assert value.std() == pytest.approx(param.init.value / math.sqrt(3), rel=0.01)
    assert abs(value.mean()) < 0.01 * param.init.value


def test_position_table_is_row_first():
    table = parameters.sincos_2d(7, 9, 16)
    omega = 10000.0 ** (-np.arange(4) / 4)
    r, c = 2, 5
    token = table[0, 1 + r * 9 + c]
    np.testing.assert_allclose(token[:4], np.sin(r * omega), atol=1e-7)
    np.testing.assert_allclose(token[4:8], np.cos(r * omega), atol=1e-7)
    np.testing.assert_allclose(token[8:12], np.sin(c * omega), atol=1e-7)
    np.testing.assert_allclose(token[12:], np.cos(c * omega), atol=1e-7)
    assert not table[0, 0].any()


def test_teacher_starts_as_the_student():
    state = parameters.initial_state(tiny_spec())
    twins = [n for n in state if n.startswith("teacher.")]
    assert twins
    for name in twins:
        np.testing.assert_array_equal(state[name], state[name.replace("teacher.", "student.", 1)])
    assert not any(n.startswith("teacher.predictor") for n in state)


def test_what_is_trained():
    params = by_name(tiny_spec())
    frozen = {n for n, p in params.items() if n.startswith("student.") and not p.trainable}
    assert {n for n in frozen if not params[n].buffer} == {
        "student.encoder.pos_embed",
        "student.encoder.patch_embed.proj.weight",
        "student.encoder.patch_embed.proj.bias",
    }
    assert not any(p.trainable for n, p in params.items() if n.startswith("teacher."))
    thawed = by_name(tiny_spec(model={"freeze_patch_embed": False}))
    assert thawed["student.encoder.patch_embed.proj.weight"].trainable


def test_a_seed_moves_every_drawn_tensor_and_a_change_of_depth_none():
    one = parameters.initial_state(tiny_spec())
    other = parameters.initial_state(tiny_spec().model_copy(update={"seed": 1}))
    deeper = parameters.initial_state(tiny_spec(model={"depth": 3}))
    for param in parameters.table(tiny_spec()):
        same = np.array_equal(one[param.name], other[param.name])
        assert same == (param.init.kind not in ("uniform", "normal")), param.name
        np.testing.assert_array_equal(one[param.name], deeper[param.name])


def test_names_are_those_of_the_torch_modules():
    pytest.importorskip("torch")
    from triptych.backends.torch.methods import MoCoV3

    spec = tiny_spec()
    state = {n: tuple(t.shape) for n, t in MoCoV3(spec).state_dict().items()}
    assert state == {p.name: p.shape for p in parameters.table(spec)}
