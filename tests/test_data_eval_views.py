"""Pictures for evaluation, and random crops from recorded draws: the pixels of four libraries."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.scripted import Scripted

from triptych.core.config import spec
from triptych.core.data import augment, pixels

GOLDEN = Path(__file__).parent / "golden/eval/eval_transforms"
ARRAYS = np.load(GOLDEN.with_suffix(".npz"))
CASES = json.loads(GOLDEN.with_suffix(".json").read_text())
DATA = spec.AugmentSpec()
SMALL = ["wide", "tall", "tiny"]
KINDS = ["bilinear", "bicubic"]


def picture(name: str) -> Image.Image:
    return Image.fromarray(ARRAYS[f"image/{name}"])


def normalized(image: Image.Image, mean=DATA.mean, std=DATA.std) -> np.ndarray:
    planes = np.empty((3, image.height, image.width), np.uint8)
    pixels.write_planes(image, planes)
    return pixels.normalize(planes, mean, std)


def view(name: str, resize: int, crop: int, *rest) -> Image.Image:
    return pixels.center_cover(picture(name), (crop, crop), resize / crop, *rest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
def test_resize_and_crop_are_torchvisions(name, kind):
    whole = pixels.cover(picture(name), (32, 32), 36 / 32, kind)
    np.testing.assert_array_equal(whole, ARRAYS[f"resize36_{kind}/{name}"])
    part, golden = view(name, 36, 32, kind), f"resize36_crop32_{kind}/{name}"
    np.testing.assert_array_equal(part, ARRAYS[f"{golden}/uint8"])
    np.testing.assert_array_equal(normalized(part), ARRAYS[f"{golden}/normalized"])


@pytest.mark.parametrize("name", ["landscape", "portrait"])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_the_published_size_are_torchvisions(name, kind):
    part, golden = view(name, 256, 224, kind), f"resize256_crop224_{kind}/{name}"
    if f"{golden}/uint8" in ARRAYS:
        np.testing.assert_array_equal(part, ARRAYS[f"{golden}/uint8"])
    total, norm, _ = ARRAYS[f"{golden}/normalized_sum_norm_probe"]
    values = normalized(part).astype(np.float64)
    assert values.sum() == pytest.approx(total, rel=1e-12)
    assert np.linalg.norm(values) == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("share", "resize", "kind"),
    [("0.875", 36, "bicubic"), ("0.9", 35, "bicubic"), ("1.0", 32, "bilinear")],
)
def test_crops_of_a_share_are_timms(name, share, resize, kind):
    found = normalized(view(name, resize, 32, kind))
    # timm converts to floats by another order of the same divisions.
    np.testing.assert_allclose(found, ARRAYS[f"timm_eval_{share}_{kind}/{name}"], rtol=0, atol=3e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL[:2])
def test_resize_and_crop_are_mmpretrains(name, kind):
    golden = ARRAYS[f"mmpretrain_resize36_crop32_{kind}_rgb/{name}"]
    np.testing.assert_array_equal(view(name, 36, 32, kind), golden)


@pytest.mark.parametrize("name", SMALL[:2])
def test_resize_and_crop_are_paddlefleetxs(name):
    found = normalized(view(name, 36, 32, "bilinear", "paddlefleetx"), [0.5], [0.5])
    golden = ARRAYS[f"paddlefleetx_resize36_crop32_bilinear/{name}"]
    np.testing.assert_allclose(found, golden, rtol=0, atol=5e-7)


@pytest.mark.parametrize("library", ["torchvision", "timm", "mmpretrain", "paddlefleetx"])
def test_sizes_and_places_equal_the_golden_table(library):
    columns = CASES["size_table_columns"]
    first = columns.index(f"{library}_resized_H")
    rounding = "paddlefleetx" if library == "paddlefleetx" else "torchvision"
    for row in ARRAYS["size_table"]:
        image = Image.new("L", (int(row[1]), int(row[0])))
        whole = pixels.cover_size(image, (224, 224), 256 / 224, rounding)
        left, top = pixels.middle(whole, (224, 224), rounding)[:2]
        assert [*whole, top, left] == list(row[first : first + 4])


@pytest.mark.parametrize("name", SMALL)
def test_the_crop_of_a_smaller_image_has_a_border_of_zeros(name):
    found = pixels.center_crop(picture(name), (40, 40))
    np.testing.assert_array_equal(found, ARRAYS[f"center_crop40/{name}"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(8))
def test_recorded_draws_give_torchvisions_crops(number, kind):
    sample = CASES["rrc"]["samples"][number]
    image, draws = picture(sample["image"]), Scripted(sample["draws"], exclusive=True)
    here = image.height, image.width
    box = augment.crop_box(draws, here, tuple(sample["scale"]), (3 / 4, 4 / 3))
    assert draws.left == []
    assert list(box) == sample["box_i_j_h_w"]
    found = pixels.crop_resize(image, box, (24, 24), kind)
    np.testing.assert_array_equal(found, ARRAYS[f"rrc/{number}/{kind}"])


@pytest.mark.parametrize("number", range(5))
def test_recorded_draws_give_paddlefleetxs_crops(number):
    sample = CASES["paddlefleetx_rrc"]["samples"][number]
    ratio, area, left, top = sample["draws"]  # our code draws the row first
    image, draws = picture(sample["image"]), Scripted([ratio, area, top, left])
    here = image.height, image.width
    box = augment.fitted_box(draws, here, tuple(sample["scale"]), (3 / 4, 4 / 3))
    assert list(box) == sample["box_i_j_h_w"]
    found = pixels.crop_resize(image, box, (24, 24), "bilinear")
    np.testing.assert_array_equal(found, ARRAYS[f"paddlefleetx_rrc/{number}"])
