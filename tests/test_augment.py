"""Augmentation: pixels against the golden arrays, draws against what the recipe promises."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triptych.core.config import spec
from triptych.core.data import augment, pixels
from triptych.core.random import stream

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


# ------------------------------------------------------------------------------------------ draws


def boxes(count: int, scale: float, ratio=(3 / 4, 4 / 3)) -> np.ndarray:
    """(count, 4) top, left, height, width on the golden image."""
    generator = stream(0, "test/boxes")
    return np.array(
        [augment.crop_box(generator, (97, 131), (scale, 1.0), ratio) for _ in range(count)]
    )


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest gap between two empirical distributions (Kolmogorov, Smirnov)."""
    values = np.union1d(a, b)
    ranks = [np.searchsorted(np.sort(x), values, "right") / len(x) for x in (a, b)]
    return float(np.abs(ranks[0] - ranks[1]).max())


def gaps(drawn: np.ndarray, golden: np.ndarray) -> list[float]:
    """Of top, left, area and proportions."""

    def features(box: np.ndarray) -> list[np.ndarray]:
        top, left, height, width = box.astype(np.float64).T
        return [top, left, height * width, width / height]

    return [distance(a, b) for a, b in zip(features(drawn), features(golden), strict=True)]


# Exceeded once in a thousand times by equal distributions of 2 000 and 20 000 values.
CRITICAL = 1.95 * math.sqrt(1 / 2000 + 1 / 20000)


@pytest.mark.parametrize("scale", [0.08, 0.2])
def test_crops_are_distributed_like_the_golden_ones(scale):
    assert max(gaps(boxes(20000, scale), GOLDEN[f"rrc_params_scale_{scale}"])) < CRITICAL


def test_other_crops_are_told_from_the_golden_ones():
    golden = GOLDEN["rrc_params_scale_0.08"]
    assert max(gaps(boxes(20000, 0.2), golden)) > CRITICAL
    assert max(gaps(boxes(20000, 0.08, (0.7, 1.4)), golden)) > CRITICAL
    centred = boxes(20000, 0.08)
    centred[:, 0] = (97 - centred[:, 2]) // 2
    assert max(gaps(centred, golden)) > CRITICAL


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
def test_a_crop_lies_inside_its_image(height, width, seed):
    top, left, h, w = augment.crop_box(
        stream(seed, "test"), (height, width), (0.08, 1.0), (3 / 4, 4 / 3)
    )
    assert 0 <= top and 0 <= left and h > 0 and w > 0
    assert top + h <= height and left + w <= width


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        ((10, 1000), (0, 493, 10, 13)),
        ((1000, 9), (494, 0, 12, 9)),
        ((20, 20), (0, 0, 20, 20)),
        ((1000, 1), (499, 0, 1, 1)),
    ],
)
def test_without_a_fitting_crop_the_middle_is_taken(here, expected):
    # No part of an image is larger than the whole.
    assert augment.crop_box(stream(0, "x"), here, (2.0, 2.0), (3 / 4, 4 / 3)) == expected


def drawn(ops: list[spec.Op], count: int) -> Counter[str]:
    """How often each operation is in a view of a 97 x 131 image."""
    names: Counter[str] = Counter()
    for number in range(count):
        changes = augment.draw(ops, stream(0, "test", number), (97, 131), (64, 64))
        names.update(getattr(change, "func", change).__name__ for change in changes)
    return names


def test_operations_come_up_as_often_as_the_recipe_says():
    ops = [
        spec.RandomResizedCrop(op="random_resized_crop"),
        spec.ColorJitter(op="color_jitter", p=0.8, brightness=0.4, hue=0.1),
        spec.Grayscale(op="grayscale", p=0.2),
        spec.GaussianBlur(op="gaussian_blur", p=1.0),
        spec.Solarize(op="solarize", p=0.0),
        spec.HorizontalFlip(op="horizontal_flip", p=0.5),
    ]
    count = 4000
    found = drawn(ops, count)
    assert found["crop_resize"] == found["gaussian_blur"] == count
    assert found["brightness"] == found["hue"]
    assert not {"solarize", "contrast", "saturation", "resize"} & set(found)
    for name, p in (("hue", 0.8), ("grayscale", 0.2), ("horizontal_flip", 0.5)):
        assert abs(found[name] / count - p) < 4 * math.sqrt(p * (1 - p) / count), name


def test_jitter_takes_every_order_and_stays_within_its_bounds():
    op = spec.ColorJitter(op="color_jitter", brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    bounds = {
        "brightness": (0.6, 1.4),
        "contrast": (0.0, 2.5),
        "saturation": (0.8, 1.2),
        "hue": (-0.1, 0.1),
    }
    orders, values = set(), {name: [] for name in bounds}
    for number in range(2000):
        _, *changes = augment.draw([op], stream(0, "test", number), (8, 8), (8, 8))
        orders.add(tuple(change.func.__name__ for change in changes))
        for change in changes:
            values[change.func.__name__] += change.keywords.values()
    assert len(orders) == 24
    for name, (low, high) in bounds.items():
        assert low <= min(values[name]) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values[name]) <= high


FULL = [
    spec.RandomResizedCrop(op="random_resized_crop", p=0.7, interpolation="bicubic"),
    spec.RandomAffine(op="random_affine", degrees=10.0, translate=0.1, scale=(0.9, 1.1), shear=5.0),
    spec.ColorJitter(op="color_jitter", brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
    spec.Grayscale(op="grayscale", p=0.3),
    spec.GaussianBlur(op="gaussian_blur", p=0.5),
    spec.Solarize(op="solarize", p=0.5),
    spec.HorizontalFlip(op="horizontal_flip", p=0.5),
]


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(16, 16), (12, 40), (40, 12)])
def test_a_view_has_the_size_asked_for_and_depends_on_nothing_else(mode, size):
    image = with_alpha(mode) if mode.endswith("A") else Image.fromarray(GOLDEN["smooth"])
    image = image.convert(mode)
    before, channels = image.tobytes(), len(image.getbands())
    for number in range(20):
        views = [
            planes(augment.view(image, FULL, stream(0, "test", number), size), channels)
            for _ in range(2)
        ]
        assert views[0].shape == (channels, *size)
        assert same(*views)
    assert image.tobytes() == before


def test_a_recipe_without_a_crop_resizes_the_whole_image():
    image = Image.fromarray(GOLDEN["smooth"])
    view = augment.view(image, (), stream(0, "test"), (20, 30))
    assert view.tobytes() == pixels.resize(image, (20, 30), "bilinear").tobytes()


@pytest.mark.parametrize(
    ("image", "size", "factor", "expected"),
    [
        ((97, 131), (64, 64), 72 / 64, (72, 97)),
        ((500, 375), (224, 224), 256 / 224, (341, 256)),
        ((100, 100), (20, 40), 1.0, (40, 40)),
        ((100, 400), (20, 40), 1.0, (20, 80)),
        ((3, 7), (16, 16), 0.5, (16, 37)),
    ],
)
def test_cover_keeps_proportions_and_is_never_too_small(image, size, factor, expected):
    found = pixels.cover(Image.new("L", image[::-1]), size, factor, "bilinear")
    assert (found.height, found.width) == expected
