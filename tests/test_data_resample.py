"""The middle of a long image: the pixels of the plain way, without its memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from triptych.core.data import pixels
from triptych.core.data.resample import resized_part

LENGTH = st.integers(1, 3000)
SIDE = st.integers(1, 40)
KIND = st.sampled_from(["bilinear", "bicubic"])


def noise(height: int, width: int, mode: str = "L") -> Image.Image:
    shape = (height, width, len(mode))
    values = np.random.default_rng(height * width).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values[..., 0] if mode == "L" else values)


@settings(max_examples=100, deadline=None)
@given(
    LENGTH, st.integers(1, 25), st.booleans(), SIDE, SIDE, st.sampled_from([1.0, 8 / 7, 1.5]), KIND
)
@example(2999, 3, True, 7, 7, 8 / 7, "bilinear")  # taller than 100 times its width, and made lower
@example(3000, 1, True, 16, 16, 1.0, "bilinear")
@example(3000, 1, False, 16, 16, 1.0, "bilinear")
@example(3000, 1, True, 16, 16, 1.0, "bicubic")
@example(2999, 20, True, 3, 17, 1.5, "bilinear")
def test_a_part_of_a_resized_image_has_its_pixels(long, short, tall, height, width, factor, kind):
    image = noise(*((long, short) if tall else (short, long)), "RGB" if long % 2 else "L")
    whole = pixels.cover_size(image, (height, width), factor)
    if whole[0] * whole[1] > 4_000_000:
        return
    plain = pixels.center_crop(pixels.resize(image, whole, kind), (height, width))
    left, top = round((whole[1] - width) / 2), round((whole[0] - height) / 2)
    part = resized_part(image, whole, (top, left, height, width), kind)
    assert part.tobytes() == plain.tobytes()


def test_another_part_or_size_has_other_pixels():
    image = noise(300, 2)
    plain = image.resize((16, 2400), Image.Resampling.BILINEAR).crop((0, 1192, 16, 1208))
    assert (
        resized_part(image, (2400, 16), (1192, 0, 16, 16), "bilinear").tobytes() == plain.tobytes()
    )
    assert (
        resized_part(image, (2400, 16), (1193, 0, 16, 16), "bilinear").tobytes() != plain.tobytes()
    )
    assert (
        resized_part(image, (2401, 16), (1192, 0, 16, 16), "bilinear").tobytes() != plain.tobytes()
    )


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("shape", [(900, 3), (3, 900), (30, 20)])
@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("rounding", ["torchvision", "paddlefleetx"])
def test_the_middle_of_the_covering_is_the_plain_one(mode, shape, kind, rounding):
    image = Image.merge(mode, [noise(*shape) for _ in mode])
    whole = pixels.cover(image, (8, 8), 8 / 7, kind, rounding)
    plain = pixels.center_crop(whole, (8, 8), rounding)
    found = pixels.center_cover(image, (8, 8), 8 / 7, kind, rounding)
    assert found.mode == mode and found.tobytes() == plain.tobytes()


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_the_memory_is_that_of_the_result(monkeypatch, kind):
    """The plain way makes 256 by 15 360 000 pixels of this."""
    sizes = []
    resize = Image.Image.resize

    def watched(image, size, *rest):
        sizes.append(size[0] * size[1])
        return resize(image, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", watched)
    tracemalloc.start()
    found = pixels.center_cover(noise(60000, 1, "RGB"), (224, 224), 8 / 7, kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.size == (224, 224)
    assert peak < 20 << 20 and max(sizes) < 4 * 224 * 224
