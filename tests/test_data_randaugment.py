"""RandAugment: golden pixels, levels and pipelines, and our own draws."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.core.config import spec
from triptych.core.data import augment, pixels, randaugment
from triptych.core.data.randaugment import OPERATIONS, Draw
from triptych.core.random import stream

GOLDEN = Path(__file__).parent / "golden/eval/randaugment"
ARRAYS = np.load(GOLDEN.with_suffix(".npz"))
CASES = json.loads(GOLDEN.with_suffix(".json").read_text())
NAMES = dict(zip(CASES["operations_in_order"], OPERATIONS, strict=True))
OP = spec.RandAugment(op="rand_augment")


@pytest.mark.parametrize("name", NAMES)
def test_operations_give_the_golden_pixels(name):
    for operation, magnitude, sign, picture, kind, _ in CASES["runs"]:
        if operation != name:
            continue
        image = Image.fromarray(ARRAYS[f"image/{picture}"])
        draw = Draw(NAMES[name], magnitude, sign < 0, kind)
        key = f"{name}/m{magnitude}{'-' if sign < 0 else '+'}/{picture}/{kind}"
        np.testing.assert_array_equal(randaugment.apply(image, draw, OP), ARRAYS[key], key)


@pytest.mark.parametrize("name", CASES["level_table"])
def test_levels_equal_the_golden_table(name):
    level = OPERATIONS[NAMES[name]].level
    widest = OP.translate if name.startswith("Translate") else 1.0
    for magnitude, *wanted in CASES["level_table"][name]:
        assert [level(magnitude / 10, sign) * widest for sign in (1, -1)] == wanted


def replayed(sample: dict) -> list[Draw]:
    """The golden draws of one pipeline in our form."""
    values = [(draw[1], draw[3]) for draw in sample["draws"] if draw[0] == "randaugment"]
    drawn = []
    signed = {"Rotate", "Color", "Contrast", "Brightness", "Sharpness", "Shear", "Translate"}
    for name in sample["operations"]:
        if values.pop(0)[1] > 0.5:
            continue
        magnitude = 9.0
        if values and values[0][0] == "gauss":
            magnitude = min(max(values.pop(0)[1], 0.0), 10.0)
        negative = any(map(name.startswith, signed)) and values.pop(0)[1] > 0.5
        drawn.append(Draw(NAMES[name], magnitude, negative, "bicubic"))
    return drawn


@pytest.mark.parametrize("number", range(6))
def test_whole_pipelines_give_the_golden_pixels(number):
    sample = CASES["pipeline"]["samples"][number]
    golden = {name: ARRAYS[f"pipeline/{number}/{name}"] for name in ("crop", "flip", "randaugment")}
    whole = Image.fromarray(ARRAYS["pipeline/image"])
    image = pixels.crop_resize(whole, tuple(sample["crop_i_j_h_w"]), (32, 32), "bicubic")
    np.testing.assert_array_equal(image, golden["crop"])
    if sample["flip_draw (flip if < 0.5)"] < 0.5:
        image = pixels.horizontal_flip(image)
    np.testing.assert_array_equal(image, golden["flip"])
    for draw in replayed(sample):
        image = randaugment.apply(image, draw, OP)
    np.testing.assert_array_equal(image, golden["randaugment"])
    planes = np.empty((3, 32, 32), np.uint8)
    pixels.write_planes(image, planes)
    recipe = spec.AugmentSpec()
    result = pixels.normalize(planes, recipe.mean, recipe.std)
    np.testing.assert_array_equal(result, ARRAYS[f"pipeline/{number}/normalize"])


def test_draws_have_their_probabilities():
    op = OP.model_copy(update={"operations": 3, "p": 0.7, "magnitude": 5.0, "deviation": 1.0})
    generator = stream(0, "test/randaugment")
    views = [randaugment.draw(op, generator) for _ in range(2000)]
    draws = [draw for view in views for draw in view]
    assert len(draws) / 6000 == pytest.approx(0.7, abs=0.03)
    names = Counter(draw.name for draw in draws)
    assert set(names) == set(OPERATIONS)
    assert max(names.values()) < 1.4 * min(names.values())
    strengths = np.array([draw.magnitude for draw in draws])
    assert strengths.mean() == pytest.approx(5.0, abs=0.1)
    assert strengths.std() == pytest.approx(1.0, abs=0.05)
    assert np.mean([draw.negative for draw in draws]) == pytest.approx(0.5, abs=0.04)
    kinds = Counter(draw.interpolation for draw in draws)
    assert kinds["bicubic"] / len(draws) == pytest.approx(0.5, abs=0.04)


def test_magnitudes_end_at_the_bounds():
    op = OP.model_copy(update={"deviation": 50.0})
    generator = stream(0, "test/randaugment")
    strengths = [draw.magnitude for _ in range(200) for draw in randaugment.draw(op, generator)]
    assert (min(strengths), max(strengths)) == (0.0, 10.0)


def test_a_recipe_may_hold_it():
    image = Image.fromarray(ARRAYS["image/photo"])
    ops = (spec.HorizontalFlip(op="horizontal_flip"), OP.model_copy(update={"p": 1.0}))
    views = [augment.view(image, ops, stream(0, "test", n), (16, 20)) for n in range(20)]
    assert {view.size for view in views} == {(20, 16)}
    assert len({view.tobytes() for view in views}) > 15


@pytest.mark.parametrize("name", OPERATIONS)
def test_bands_are_moved_alone_and_alpha_keeps_its_values(name):
    photo = Image.fromarray(ARRAYS["image/photo"])
    alpha = photo.convert("L")
    image = photo.copy()
    image.putalpha(alpha)
    draw = Draw(name, 9.0, False, "bilinear")
    op = OP.model_copy(update={"fill": (1, 2, 3, 4)})
    result = randaugment.apply(image, draw, op)
    wanted = randaugment.apply(photo, draw, op.model_copy(update={"fill": (1, 2, 3)}))
    np.testing.assert_array_equal(np.asarray(result)[..., :3], wanted)
    moved = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    grey = op.model_copy(update={"fill": (4,)})
    other = randaugment.apply(alpha, draw, grey) if moved else alpha
    np.testing.assert_array_equal(result.getchannel("A"), other)


def test_an_image_made_grey_is_filled_with_the_luminance():
    image = Image.new("L", (20, 20), 255)
    draw = Draw("translate_x", 10.0, False, "bilinear")
    assert randaugment.apply(image, draw, OP).getpixel((19, 0)) == 117
    one = OP.model_copy(update={"fill": (7,)})
    assert randaugment.apply(image, draw, one).getpixel((19, 0)) == 7
    assert randaugment.apply(image.convert("RGB"), draw, one).getpixel((19, 0)) == (7, 7, 7)
