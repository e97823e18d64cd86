"""Augmentation: draws against what the recipe promises, and the views they make."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data_pixels import GOLDEN, planes, same, with_alpha

from triptych.core.config import spec
from triptych.core.data import augment, pixels
from triptych.core.random import stream


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


def test_crops_keep_to_their_bounds_and_reach_them():
    """On an image so large that rounding does not blur them."""
    generator = stream(0, "test/bounds")
    drawn = np.array(
        [augment.crop_box(generator, (9000, 9000), (0.1, 0.5), (0.5, 1.5)) for _ in range(3000)]
    )
    area, ratio = drawn[:, 2] * drawn[:, 3] / 9000**2, drawn[:, 3] / drawn[:, 2]
    for values, low, high in ((area, 0.1, 0.5), (ratio, 0.5, 1.5)):
        assert low - 1e-3 < values.min() < low + 1e-2 * (high - low)
        assert high - 1e-2 * (high - low) < values.max() < high + 1e-3


SAMPLERS = {"inception": augment.crop_box, "fitted": augment.fitted_box}


@pytest.mark.parametrize("sampler", SAMPLERS)
@settings(deadline=None, max_examples=200)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
def test_a_crop_lies_inside_its_image(sampler, height, width, seed):
    top, left, h, w = SAMPLERS[sampler](
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


@pytest.mark.parametrize(
    ("sampler", "area", "logarithm"), [("inception", 0.496, 0.038), ("fitted", 0.488, 0.027)]
)
def test_samplers_differ_as_the_originals_do(sampler, area, logarithm):
    """Mean area and log-ratio that torchvision and PaddleFleetX give at 500 x 375, scale 0.2."""
    generator = stream(0, "test/samplers")
    ops = [spec.RandomResizedCrop(op="random_resized_crop", scale=(0.2, 1.0), sampler=sampler)]
    drawn = np.array(
        [augment.draw(ops, generator, (375, 500), (8, 8))[0].keywords["box"] for _ in range(30000)]
    )
    height, width = drawn[:, 2], drawn[:, 3]
    assert np.mean(height * width) / (375 * 500) == pytest.approx(area, abs=0.005)
    assert np.mean(np.log(width / height)) == pytest.approx(logarithm, abs=0.004)


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
