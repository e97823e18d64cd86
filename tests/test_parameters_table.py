"""Canonical names, shapes and initial values (MoCo v3's own bounds)."""

import math

import numpy as np
import pytest
from support.native import TINY, tiny_spec

from triptych.core import config, parameters
from triptych.core.config.spec import RESNET_PRESETS, RunSpec


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


def drawn(param):
    return parameters.initial_value(param, seed=0).astype(np.float64)


def test_initial_values_of_resnet50():
    """The fact sheet's: Kaiming-normal by what goes out; Paddle counts what comes in."""
    ours, paddles = (by_name(config.load(f"moco_v2/resnet50{end}")) for end in ("", "_paddle"))
    for params, stem, shortcut in ((ours, 0.0253, 0.03125), (paddles, 0.1166, 0.0442 * 4)):
        assert drawn(params["student.encoder.conv1.weight"]).std() == pytest.approx(stem, rel=0.03)
        name = "student.encoder.layer1.0.downsample.0.weight"
        wide = shortcut * math.sqrt(2048 / 256) if params is ours else shortcut
        assert drawn(params[name]).std() == pytest.approx(wide, rel=0.03)
    for name in ("student.projector.0.weight", "student.projector.2.weight"):
        assert np.abs(drawn(ours[name])).max() == pytest.approx(0.0221, rel=2e-3)
    assert np.abs(drawn(ours["student.projector.0.bias"])).max() == pytest.approx(0.0221, rel=2e-2)
    assert drawn(paddles["student.projector.2.weight"]).std() == pytest.approx(0.01, rel=0.01)
    hidden = drawn(paddles["student.projector.0.weight"])
    assert np.abs(hidden).max() == pytest.approx(0.03827, rel=2e-3)
    assert not drawn(paddles["student.projector.0.bias"]).any()


def test_residual_gains_start_at_zero_where_the_recipe_says_so():
    zero, one = (by_name(config.load(f"moco_v3/resnet50_{n}ep")) for n in (1000, 800))
    for params, gain in ((zero, 0.0), (one, 1.0)):
        assert (drawn(params["student.encoder.layer3.2.bn3.weight"]) == gain).all()
        assert (drawn(params["student.encoder.layer3.2.bn2.weight"]) == 1.0).all()
        assert (drawn(params["student.encoder.layer3.0.downsample.1.weight"]) == 1.0).all()


def test_the_queue_starts_as_random_unit_columns():
    state = parameters.initial_state(tiny_spec(case="moco_v2_bottleneck"))
    queue = state["memory.queue"].astype(np.float64)
    np.testing.assert_allclose((queue**2).sum(0), 1.0, rtol=1e-6)
    assert queue.shape == (16, 20) and abs(queue.mean()) < 0.05
    assert state["memory.pointer"].dtype == np.int64 and state["memory.pointer"].shape == ()


def test_the_convolutional_stem_starts_like_pytorchs_layers():
    params = by_name(recipe("vit_conv_small"))
    for i, fan_in in ((0, 27), (3, 48 * 9), (6, 96 * 9), (9, 192 * 9), (12, 384)):
        bound = params[f"student.encoder.patch_embed.proj.{i}.weight"].init.value
        assert bound == pytest.approx(1 / math.sqrt(fan_in))
    # Freezing is for the patch projection.
    assert params["student.encoder.patch_embed.proj.0.weight"].trainable
    assert "student.encoder.patch_embed.proj.0.bias" not in params


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


@pytest.mark.parametrize("case", TINY)
def test_names_are_those_of_the_torch_modules(case):
    pytest.importorskip("torch")
    from triptych.backends.torch.methods import METHODS

    spec = tiny_spec(case=case)
    state = {n: tuple(t.shape) for n, t in METHODS[spec.method.name](spec).state_dict().items()}
    # Pointer and count of queue and codebook are numbers of the host.
    state.update({"memory.pointer": ()} if any(n.startswith("memory.") for n in state) else {})
    state.update({"memory.updates": ()} if "memory.words" in state else {})
    assert state == {p.name: p.shape for p in parameters.table(spec)}


@pytest.mark.parametrize("name", [name for name, preset in RESNET_PRESETS.items() if preset])
def test_resnets_have_torchvisions_tensors(name):
    models = pytest.importorskip("torchvision").models
    theirs = getattr(models, name)().state_dict()
    want = [(n, tuple(t.shape)) for n, t in theirs.items() if not n.startswith("fc.")]
    spec = config.load("moco_v2/resnet50", [f"model.name={name}"])
    assert [(p.name, p.shape) for p in parameters.encoder(spec.model)] == want
    change = [f"model.{key}={value}" for key, value in RESNET_PRESETS[name].items()]
    change = [text.replace("(", "[").replace(")", "]") for text in change]
    same = config.load("moco_v2/resnet50", ["model.name=resnet", *change])
    assert parameters.table(same) == parameters.table(spec)


def test_any_residual_network_has_its_blocks():
    spec = config.load(
        "moco_v2/resnet50",
        ["model={name: resnet, block: bottleneck, depths: [2, 1, 2, 1], width: 2}"],
    )
    found = by_name(spec)
    assert spec.model.features == found["student.projector.0.weight"].shape[1] == 64
    names = {n.split(".")[2] + "." + n.split(".")[3] for n in found if ".layer" in n}
    assert names == {"layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer3.1", "layer4.0"}
    assert found["student.encoder.layer4.0.conv3.weight"].shape == (64, 16, 1, 1)


def test_the_last_norms_have_gain_and_shift_where_the_spec_says_so():
    plain, affine = (recipe("vit_small", last_norm_affine=value) for value in (False, True))
    more = by_name(affine).keys() - by_name(plain).keys()
    last = ("student.projector.7", "teacher.projector.7", "student.predictor.4")
    assert more == {f"{norm}.{part}" for norm in last for part in ("weight", "bias")}
    assert by_name(affine)["student.predictor.4.weight"].shape == (256,)
    bare = by_name(recipe("vit_small", last_norm_affine=True, predictor_last_norm=False))
    assert not any(name.startswith("student.predictor.4") for name in bare)


def test_the_predictor_may_have_a_hidden_width_of_its_own():
    found = by_name(recipe("vit_small", hidden_dim=48, predictor_hidden_dim=40))
    assert found["student.projector.0.weight"].shape[0] == 48
    assert found["student.predictor.0.weight"].shape == (40, 256)
    assert found["student.predictor.3.weight"].shape == (256, 40)


@pytest.mark.parametrize(("width", "hidden"), [(192, 480), (24, 100), (24, 16), (44, 49)])
def test_an_mlp_may_have_any_hidden_width(width, hidden):
    """The ratio that a division of two whole numbers gives is enough to find the hidden width."""
    change = [f"model.width={width}", "model.heads=1", f"model.mlp_ratio={hidden / width!r}"]
    spec = config.load("moco_v3/digits", change)
    assert by_name(spec)["student.encoder.blocks.0.mlp.fc2.weight"].shape == (width, hidden)
