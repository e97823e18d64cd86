"""Position tables of one grid on another, as the original programs resample them."""

import numpy as np
import pytest
from support.golden_weights import GOLDEN
from test_formats_pretrained import MOCA, V3, encoder_of, load, refusal, saved, supervised

from triptych.core import checkpoint
from triptych.core.formats.positions import resample
from triptych.core.parameters import initial_state

ENCODER = "student.encoder."
OLD = (14, 14)
VARIANTS = {
    # variant: (way, largest error). timm and mmpretrain compute in float32.
    "moca": ("bicubic", 1e-13),
    "msn": ("bicubic", 1e-13),
    "mmpretrain": ("bicubic", 1e-5),
    "timm_bicubic": ("bicubic", 1e-5),
    "timm_bicubic_antialias": ("bicubic_antialias", 1e-5),
    "dino": ("dino", 1e-13),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tables_are_those_of_the_originals(variant):
    way, allowed = VARIANTS[variant]
    with np.load(GOLDEN / "eval" / "pos_embed.npz") as golden:
        table = golden["pos_embed"]
        cases = [name for name in golden.files if name.startswith(f"{variant}/")]
        assert len(cases) > 1
        for name in cases:
            rows, columns = map(int, name.split("/")[1].split("x"))
            mine = resample(table, OLD, (rows, columns), way)
            np.testing.assert_allclose(mine, golden[name], rtol=0, atol=allowed, err_msg=name)
            for other in {"bicubic", "bicubic_antialias", "dino"} - {way}:
                if (rows, columns) != OLD:
                    wrong = resample(table, OLD, (rows, columns), other)
                    assert np.abs(wrong - golden[name]).max() > 0.1, (name, other)


@pytest.mark.parametrize("variant", ["torch_bicubic_align_corners", "timm_bilinear_antialias"])
def test_other_ways_of_resampling_are_told_apart(variant):
    """The golden file shows two tables that no way gives."""
    with np.load(GOLDEN / "eval" / "pos_embed.npz") as golden:
        for name in (name for name in golden.files if name.startswith(f"{variant}/")):
            new = tuple(map(int, name.split("/")[1].split("x")))
            wrong = golden[name][:, -new[0] * new[1] :]
            for way in ("bicubic", "bicubic_antialias", "dino"):
                mine = resample(golden["pos_embed"], OLD, new, way)[:, 1:]
                assert np.abs(mine - wrong).max() > 0.1, (name, way)


@pytest.mark.parametrize(("old", "new"), [((5, 9), (7, 4)), ((3, 8), (6, 16)), ((1, 6), (2, 3))])
def test_rectangular_tables_are_those_of_pytorch(old, new):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(1, 1 + old[0] * old[1], 4))
    grid = torch.from_numpy(table[:, 1:]).reshape(1, *old, 4).permute(0, 3, 1, 2)
    for way, options in (
        ("bicubic", {"size": new}),
        ("bicubic_antialias", {"size": new, "antialias": True}),
        ("dino", {"scale_factor": tuple((n + 0.1) / o for o, n in zip(old, new, strict=True))}),
    ):
        wanted = torch.nn.functional.interpolate(grid, mode="bicubic", **options)
        wanted = wanted.permute(0, 2, 3, 1).reshape(1, -1, 4).numpy()
        mine = resample(table, old, new, way)
        np.testing.assert_allclose(mine[:, 1:], wanted, rtol=0, atol=1e-12, err_msg=way)
        assert np.array_equal(mine[:, 0], table[:, 0])


def test_a_table_of_another_grid_is_resampled_only_on_request(tmp_path):
    spec = supervised(MOCA, image_size=(48, 96))
    path = saved(tmp_path, encoder_of(MOCA))
    assert refusal(path, spec) == [
        "pos_embed: a grid of 8x8 patches, the model's is 6x12; set init.positions to bicubic, "
        "bicubic_antialias or dino to resample it"
    ]
    table = encoder_of(MOCA)["pos_embed"]
    for way in ("bicubic", "bicubic_antialias", "dino"):
        loaded = load(path, spec, positions=way)["student.encoder.pos_embed"]
        assert np.array_equal(loaded, resample(table, (8, 8), (6, 12), way))
    equal = load(path, supervised(MOCA), positions="dino")["student.encoder.pos_embed"]
    assert np.array_equal(equal, table)


def test_the_manifest_shows_the_grid_of_a_rectangular_table(tmp_path):
    wide, tall = (supervised(MOCA, image_size=size) for size in ((32, 128), (128, 32)))
    state = initial_state(wide)
    run = checkpoint.write(tmp_path / "run", 1, state, wide, {}, keep=1)
    (line,) = refusal(run, tall)
    assert line.startswith("pos_embed: a grid of 4x16 patches, the model's is 16x4;")
    loaded = load(run, tall, positions="bicubic")["student.encoder.pos_embed"]
    assert np.array_equal(
        loaded, resample(state[f"{ENCODER}pos_embed"], (4, 16), (16, 4), "bicubic")
    )
    plain = {n.removeprefix(ENCODER): a for n, a in state.items() if n.startswith(ENCODER)}
    plain["pos_embed"] = plain["pos_embed"][:, :-1]
    assert refusal(saved(tmp_path, plain), supervised(MOCA), positions="bicubic") == [
        "pos_embed: 64 positions are those of no square grid and a class token; the model's grid "
        "is 8x8"
    ]


def test_a_convolutional_stem_has_the_same_table(tmp_path):
    spec = supervised(V3, stem="conv", image_size=32)
    state = initial_state(spec)
    plain = {n.removeprefix(ENCODER): a for n, a in state.items() if n.startswith(ENCODER)}
    larger = supervised(V3, stem="conv", image_size=64)
    loaded = load(saved(tmp_path, plain), larger, positions="bicubic")
    assert loaded[f"{ENCODER}pos_embed"].shape == (1, 17, 192)


def test_a_first_layer_for_other_channels_is_adapted_only_on_request(tmp_path):
    spec = supervised(V3)
    grey = spec.model_copy(update={"model": spec.model.model_copy(update={"channels": 1})})
    path = saved(tmp_path, encoder_of(V3))
    assert refusal(path, grey) == [
        "weights of another architecture: the file has channels 3; the model channels 1; set "
        "init.channels to adapted to change the first layer"
    ]
    loaded = load(path, grey, channels="adapted")[f"{ENCODER}patch_embed.proj.weight"]
    weight = encoder_of(V3)["patch_embed.proj.weight"]
    np.testing.assert_allclose(loaded, weight.sum(axis=1, keepdims=True), rtol=0, atol=1e-6)
    equal = load(path, spec, channels="adapted")[f"{ENCODER}patch_embed.proj.weight"]
    assert np.array_equal(equal, weight)
