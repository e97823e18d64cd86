"""Augmentation: pixels against the golden arrays; channels, alpha and affine motion."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.core.data import pixels

GOLDEN = np.load(Path(__file__).parent / "golden" / "augmentation.npz")
SOURCES = ("image", "smooth")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def planes(image: Image.Image, channels: int = 3) -> np.ndarray:
    """(C, H, W) uint8."""
    out = np.empty((channels, image.height, image.width), np.uint8)
    pixels.write_planes(image, out)
    return out


def same(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Equal in type, shape and every value."""
    return actual.dtype == expected.dtype and np.array_equal(actual, expected)


def jitter(image: Image.Image) -> Image.Image:
    image = pixels.contrast(pixels.brightness(image, 1.3), 0.7)
    return pixels.hue(pixels.saturation(image, 1.4), 0.08)


def crop(image: Image.Image) -> Image.Image:
    return pixels.crop_resize(image, (10, 20, 60, 80), (64, 64), "bilinear")


def composed(image: Image.Image) -> np.ndarray:
    image = pixels.gaussian_blur(jitter(crop(image)), 1.0)
    return pixels.normalize(planes(pixels.horizontal_flip(pixels.solarize(image, 128))), MEAN, STD)


def jitter_backwards(image: Image.Image) -> Image.Image:
    image = pixels.saturation(pixels.hue(image, -0.1), 1.4)
    return pixels.brightness(pixels.contrast(image, 0.7), 1.3)


CASES = {
    "center_crop64": lambda image: pixels.center_crop(image, (64, 64)),
    "hflip": pixels.horizontal_flip,
    "grayscale3": pixels.grayscale,
    "solarize_128": lambda image: pixels.solarize(image, 128),
    "jitter_b1.3_c0.7_s1.4_h0.08": jitter,
    "jitter_h-0.1_s1.4_c0.7_b1.3": jitter_backwards,
    "to_tensor": lambda image: pixels.normalize(planes(crop(image)), (0.0,), (1.0,)),
    "normalize": lambda image: pixels.normalize(planes(crop(image)), MEAN, STD),
    "composed_view": composed,
}
for _name, _operation, _values in (
    ("brightness", pixels.brightness, (1.3, 0.6)),
    ("contrast", pixels.contrast, (0.7, 1.4)),
    ("saturation", pixels.saturation, (1.4, 0.6)),
    ("hue", pixels.hue, (0.08, -0.1, 0.4, -0.4)),
    ("gaussian_blur_radius", pixels.gaussian_blur, (0.1, 0.5, 1.0, 2.0)),
):
    for _value in _values:
        CASES[f"{_name}_{_value}"] = lambda image, f=_operation, v=_value: f(image, v)
for _kind in ("bilinear", "bicubic"):
    for _box in ((10, 20, 60, 80), (5, 7, 20, 16)):
        CASES[f"resized_crop_{'_'.join(map(str, _box))}_to64_{_kind}"] = (
            lambda image, b=_box, k=_kind: pixels.crop_resize(image, b, (64, 64), k)
        )
    CASES[f"resize72_{_kind}"] = lambda image, k=_kind: pixels.cover(image, (64, 64), 72 / 64, k)
    CASES[f"resize72_centercrop64_{_kind}"] = lambda image, k=_kind: pixels.center_crop(
        pixels.cover(image, (64, 64), 72 / 64, k), (64, 64)
    )


def result(source: str, case: str) -> np.ndarray:
    value = CASES[case](Image.fromarray(GOLDEN[source]))
    return value if isinstance(value, np.ndarray) else planes(value).transpose(1, 2, 0)


def test_every_golden_operation_is_compared():
    expected = {f"{source}/{case}" for source in SOURCES for case in CASES}
    sampled = {"rrc_params_scale_0.08", "rrc_params_scale_0.2"}
    assert set(GOLDEN.files) == expected | set(SOURCES) | sampled


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES)
def test_pixels_equal_the_golden_ones(source, case):
    assert same(result(source, case), GOLDEN[f"{source}/{case}"])


WRONG = {
    "brightness_1.3": lambda image: pixels.brightness(image, 1.31),
    "contrast_0.7": lambda image: pixels.brightness(image, 0.7),
    "saturation_1.4": lambda image: pixels.saturation(image, 1.39),
    "hue_0.08": lambda image: pixels.hue(image, 0.0863),
    "gaussian_blur_radius_1.0": lambda image: pixels.gaussian_blur(image, 1.1),
    "solarize_128": lambda image: pixels.solarize(image, 129),
    "jitter_b1.3_c0.7_s1.4_h0.08": lambda image: pixels.contrast(
        pixels.brightness(pixels.hue(pixels.saturation(image, 1.4), 0.08), 1.3), 0.7
    ),
    "center_crop64": lambda image: image.crop((33, 16, 97, 80)),
    # The filter of resize(box=...) reaches over the border of the box.
    "resized_crop_10_20_60_80_to64_bilinear": lambda image: image.resize(
        (64, 64), Image.Resampling.BILINEAR, (20, 10, 100, 70)
    ),
    "resize72_bilinear": lambda image: pixels.resize(image, (72, 97), "bicubic"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_factor_or_order_is_seen(case):
    wrong = np.asarray(WRONG[case](Image.fromarray(GOLDEN["image"])))
    assert wrong.shape == GOLDEN[f"image/{case}"].shape
    assert not same(wrong, GOLDEN[f"image/{case}"])


def test_the_comparison_itself_can_fail():
    values = GOLDEN["image/normalize"]
    assert same(values, values.copy())
    assert not same(values.astype(np.float64), values)
    assert not same(values[:, :-1], values)
    assert not same(np.nextafter(values, np.float32(9)), values)


# -------------------------------------------------------------------------------- channels, alpha


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(GOLDEN["smooth"]).convert(mode[:-1])
    image.putalpha(Image.fromarray(GOLDEN["image"][..., 0]))
    return image


COLOUR = {
    "brightness": lambda image: pixels.brightness(image, 1.4),
    "contrast": lambda image: pixels.contrast(image, 0.5),
    "saturation": lambda image: pixels.saturation(image, 0.3),
    "hue": lambda image: pixels.hue(image, 0.3),
    "blur": lambda image: pixels.gaussian_blur(image, 1.5),
    "solarize": lambda image: pixels.solarize(image, 100),
    "grayscale": pixels.grayscale,
}


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("name", COLOUR)
def test_colour_operations_leave_alpha_alone(mode, name):
    image = with_alpha(mode)
    before = image.tobytes()
    after = COLOUR[name](image)
    assert same(np.asarray(after.getchannel("A")), GOLDEN["image"][..., 0])
    colour = COLOUR[name](image.convert(mode[:-1]))
    assert after.convert(colour.mode).tobytes() == colour.tobytes()
    assert image.tobytes() == before  # nothing is changed in place


@pytest.mark.parametrize("name", ["saturation", "hue", "grayscale"])
def test_a_grey_image_has_no_colour_to_change(name):
    grey = Image.fromarray(GOLDEN["image"][..., 0])
    assert COLOUR[name](grey).tobytes() == grey.tobytes()


@pytest.mark.parametrize("name", COLOUR)
def test_one_grey_band_stands_for_three_equal_ones(name):
    """``grayscale`` keeps one band: what follows must not see the difference."""
    grey = Image.fromarray(GOLDEN["smooth"]).convert("L")
    assert same(planes(COLOUR[name](grey)), planes(COLOUR[name](grey.convert("RGB"))))


def test_grey_with_alpha_comes_back_as_colour_with_alpha():
    image = with_alpha("RGBA")
    back = planes(pixels.grayscale(image), 4)
    assert same(back[0], np.asarray(image.convert("RGB").convert("L")))
    assert same(back[0], back[2]) and same(back[3], GOLDEN["image"][..., 0])


def test_normalize_takes_one_value_for_all_channels():
    values = planes(Image.fromarray(GOLDEN["image"]))[None]
    assert same(
        pixels.normalize(values, (0.5,), (0.25,)), pixels.normalize(values, (0.5,) * 3, (0.25,) * 3)
    )
    with pytest.raises(ValueError):
        pixels.normalize(values, (0.5, 0.5), (1.0,))


# ------------------------------------------------------------------- bands that are no transparency


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize(
    "operation",
    [
        lambda image: pixels.resize(image, (40, 50), "bilinear"),
        lambda image: pixels.resize(image, (300, 200), "bicubic"),
        lambda image: pixels.crop_resize(image, (10, 20, 60, 80), (64, 64), "bicubic"),
        lambda image: pixels.affine(image, 20.0, (3.0, -2.0), 0.8, 5.0),
    ],
)
def test_geometry_treats_each_band_as_if_it_were_alone(mode, operation):
    image = with_alpha(mode)
    alone = [operation(band).tobytes() for band in image.split()]
    assert [band.tobytes() for band in operation(image).split()] == alone


def test_a_crop_knows_no_limit_on_pixels(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)
    image = with_alpha("RGBA")
    assert pixels.crop_resize(image, (0, 0, 90, 120), (8, 8), "bilinear").size == (8, 8)
    assert pixels.center_cover(image, (8, 8), 2.0, "bilinear").size == (8, 8)
    assert Image.MAX_IMAGE_PIXELS == 9 and not recwarn.list


def test_a_fourth_band_of_zeros_takes_nothing_from_the_others():
    image = Image.new("RGBA", (20, 20), (200, 100, 50, 0))
    found = np.asarray(pixels.resize(image, (7, 9), "bilinear"))
    assert np.unique(found.reshape(-1, 4), axis=0).tolist() == [[200, 100, 50, 0]]


# ----------------------------------------------------------------------------------------- affine


def spot(height: int, width: int, y: float, x: float) -> Image.Image:
    """A bright spot of 2.5 pixels."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    value = 255 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 12.5)
    return Image.fromarray(value.astype(np.uint8))


def centre_of_mass(image: Image.Image) -> np.ndarray:
    """(y, x)."""
    value = np.asarray(image, np.float64)
    grid = np.mgrid[: value.shape[0], : value.shape[1]] + 0.5
    return (grid * value).sum((1, 2)) / value.sum()


def test_affine_without_a_change_is_the_identity():
    image = Image.fromarray(GOLDEN["image"])
    assert pixels.affine(image, 0.0, (0.0, 0.0), 1.0, 0.0).tobytes() == image.tobytes()


def test_affine_by_whole_pixels_and_quarter_turns_is_exact():
    image = Image.fromarray(GOLDEN["image"][:, :97])
    moved = np.asarray(pixels.affine(image, 0.0, (3.0, -2.0), 1.0, 0.0))
    assert same(moved[:-2, 3:], GOLDEN["image"][2:, :94])
    assert not moved[-2:].any() and not moved[:, :3].any()
    turned = np.asarray(pixels.affine(image, 90.0, (0.0, 0.0), 1.0, 0.0)).astype(int)
    assert np.abs(turned - np.rot90(GOLDEN["image"][:, :97], -1).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("angle", "shift", "scale", "shear"),
    [(20.0, (0, 0), 1.0, 0.0), (0.0, (0, 0), 1.0, 15.0), (-30.0, (4, -3), 0.8, 10.0)],
)
def test_affine_moves_a_spot_where_the_formula_says(angle, shift, scale, shear):
    height, width, at = 60, 80, np.array([22.0, 52.0])
    turn = math.radians(angle)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    lean = np.array([[1, math.tan(math.radians(shear))], [0, 1]])
    centre = np.array([width / 2, height / 2])
    expected = scale * rotation @ lean @ (at[::-1] - centre) + centre + shift
    moved = pixels.affine(spot(height, width, *at), angle, shift, scale, shear)
    assert np.abs(centre_of_mass(moved)[::-1] - expected).max() < 0.1
