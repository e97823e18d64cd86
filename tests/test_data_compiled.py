"""Compiled loops give the bytes of Pillow, and a machine without them loses time only."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.data_specs import folder_spec, write_images

from triptych.core.config import spec
from triptych.core.data import Pipeline, augment, compiled, open_train, pixels, views
from triptych.core.data.compiled import Kernels, address
from triptych.core.random import stream

pytestmark = pytest.mark.skipif(not compiled.available(), reason="the extra fast is not installed")
MODES = ("L", "LA", "RGB", "RGBA")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """Those of this machine, compiled if they are not yet."""
    assert compiled.builder().wait(timeout=200) == 0
    loaded = compiled.load()
    assert loaded is not None
    return loaded


def image(generator: np.random.Generator, mode: str, height: int, width: int) -> Image.Image:
    """Noise, a plain area with a border, or smooth bands."""
    shape = (height, width, len(mode))
    kind = generator.integers(3)
    if kind == 0:
        values = generator.integers(0, 256, shape)
    elif kind == 1:
        values = np.full(shape, generator.integers(0, 256, len(mode)))
        values[: height // 2] = generator.integers(0, 256, len(mode))
    else:
        steps = np.cumsum(generator.integers(-9, 10, shape), 1)
        values = np.clip(generator.integers(0, 256, len(mode)) + steps, 0, 255)
    return Image.frombytes(mode, (width, height), values.astype(np.uint8).tobytes())


def recipe(generator: np.random.Generator) -> list[spec.Op]:
    kind = "bicubic" if generator.random() < 0.5 else "bilinear"
    strong = {"brightness": 0.9, "contrast": 0.9, "saturation": 2.0, "hue": 0.5}
    return [
        spec.RandomResizedCrop(
            op="random_resized_crop", p=0.9, scale=(0.02, 1.0), interpolation=kind
        ),
        spec.HorizontalFlip(op="horizontal_flip", p=0.3),
        spec.ColorJitter(op="color_jitter", p=0.8, **strong),
        spec.RandomAffine(op="random_affine", p=0.1, degrees=10.0),
        spec.Grayscale(op="grayscale", p=0.2),
        spec.ColorJitter(op="color_jitter", p=0.3, **strong),
        spec.GaussianBlur(op="gaussian_blur", p=0.6, sigma=(0.0, 2.6)),
        spec.Solarize(op="solarize", p=0.3),
        spec.HorizontalFlip(op="horizontal_flip", p=0.5),
    ]


def both(
    kernels: Kernels, source: Image.Image, changes: list[augment.Change], shape: tuple[int, ...]
) -> list[np.ndarray]:
    """A view by Pillow, and by compiled loops."""
    made = [np.zeros(shape, np.uint8) for _ in range(2)]
    views.write_by_pillow(source, changes, made[0])
    views.write_compiled(kernels, source, changes, made[1])
    return made


def check_views(kernels: Kernels, mode: str, numbers: range) -> None:
    for number in numbers:
        generator = stream(0, f"test/{mode}", number)
        height, width = (int(n) for n in generator.integers(1, 161, 2))
        high, wide = (int(n) for n in generator.integers(1, 81, 2))
        source = image(generator, mode, height, width)
        changes = augment.draw(recipe(generator), generator, (height, width), (high, wide))
        pillow, ours = both(kernels, source, changes, (len(mode), high, wide))
        assert np.array_equal(pillow, ours), (number, changes)


@pytest.mark.parametrize("mode", MODES)
def test_random_views_are_those_of_pillow(kernels, mode):
    check_views(kernels, mode, range(200))


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
def test_ten_thousand_random_views_are_those_of_pillow(kernels, mode):
    check_views(kernels, mode, range(200, 2700))


CHANGES = {
    "brightness": partial(pixels.brightness, factor=1.3),
    "contrast": partial(pixels.contrast, factor=0.6),
    "saturation": partial(pixels.saturation, factor=1.7),
    "hue": partial(pixels.hue, shift=0.1),
    "grayscale": pixels.grayscale,
    "gaussian_blur": partial(pixels.gaussian_blur, radius=1.2),
    "solarize": partial(pixels.solarize, threshold=90),
    "horizontal_flip": pixels.horizontal_flip,
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_made_by_a_loop_and_the_comparison_would_see_another_one(kernels, name):
    source = image(stream(0, "test"), "RGB", 50, 70)
    whole = partial(pixels.resize, size=(32, 24), interpolation="bilinear")
    pillow, ours = both(kernels, source, [whole, CHANGES[name]], (3, 32, 24))
    assert views.is_compiled(CHANGES[name]) and np.array_equal(pillow, ours)
    assert not np.array_equal(ours, both(kernels, source, [whole], (3, 32, 24))[0])


def colours(step: int) -> np.ndarray:
    """(H, W, 3) every ``step``-th value of each channel with every one of the others."""
    axis = np.arange(0, 256, step, dtype=np.uint8)
    cube = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)
    return np.ascontiguousarray(cube.reshape(len(axis), -1, 3))


@pytest.mark.parametrize(
    ("step", "shifts"),
    [(5, (0.0, 0.08, -0.1)), pytest.param(1, (0.0, 0.3, -0.45), marks=pytest.mark.soak)],
)
def test_every_colour_is_turned_as_pillow_turns_it(kernels, step, shifts):
    """Single precision serves, though Pillow divides in double precision: tried on all colours."""
    cube = colours(step)
    source, planes = Image.fromarray(cube), cube.transpose(2, 0, 1)
    for shift in shifts:
        turned = planes.copy()
        kernels.turn_hue(address(turned), turned[0].size, int(shift * 255) % 256)
        assert np.array_equal(turned.transpose(1, 2, 0), np.asarray(pixels.hue(source, shift)))


@pytest.mark.parametrize(
    ("size", "box"), [((3, 900), (0, 0, 900, 3)), ((2100, 2100), (9, 9, 40, 50))]
)
def test_what_the_loops_cannot_read_is_left_to_pillow(kernels, size, box):
    """An image so tall that Pillow turns the order round, and one that it keeps in parts."""
    source = Image.effect_noise(size, 60).convert("RGB")
    change = partial(pixels.crop_resize, box=box, size=(16, 16), interpolation="bilinear")
    assert np.array_equal(*both(kernels, source, [change], (3, 16, 16)))


@pytest.mark.parametrize("mode", MODES)
def test_views_for_evaluation_are_those_of_pillow(kernels, mode):
    for number in range(100):
        generator = stream(0, f"test/evaluation/{mode}", number)
        height, width = (int(n) for n in generator.integers(1, 161, 2))
        high, wide = (int(n) for n in generator.integers(1, 81, 2))
        source = image(generator, mode, height, width)
        change = partial(
            pixels.center_cover,
            size=(high, wide),
            factor=float(generator.choice([1.0, 8 / 7, 1.6])),
            interpolation=str(generator.choice(["bilinear", "bicubic"])),
            rounding=str(generator.choice(["torchvision", "paddlefleetx"])),
        )
        pillow, ours = both(kernels, source, [change], (len(mode), high, wide))
        assert np.array_equal(pillow, ours), (number, change)


def test_a_view_for_evaluation_is_made_by_loops(kernels, monkeypatch):
    change = partial(
        pixels.center_cover,
        size=(24, 32),
        factor=1.5,
        interpolation="bicubic",
        rounding="torchvision",
    )
    pillow, _ = both(kernels, image(stream(0, "test"), "RGB", 50, 70), [change], (3, 24, 32))
    monkeypatch.setattr(Image.Image, "resize", None)
    ours = np.zeros_like(pillow)
    views.write_compiled(kernels, image(stream(0, "test"), "RGB", 50, 70), [change], ours)
    assert np.array_equal(pillow, ours)


@pytest.mark.parametrize(("mode", "planes"), [("L", 3), ("L", 4), ("LA", 4)])
def test_grey_that_fills_further_planes_is_left_to_pillow(kernels, mode, planes):
    """The loops write the planes of an image's own bands, and would read beyond its bytes."""
    change = partial(pixels.resize, size=(9, 11), interpolation="bilinear")
    source = image(stream(0, "test"), mode, 20, 30)
    assert np.array_equal(*both(kernels, source, [change], (planes, 9, 11)))


def test_planes_that_no_image_fills_are_refused(kernels):
    change = partial(pixels.resize, size=(9, 11), interpolation="bilinear")
    out = np.zeros((1, 9, 11), np.uint8)
    with pytest.raises(ValueError, match="broadcast"):
        views.write_compiled(kernels, image(stream(0, "test"), "RGB", 20, 30), [change], out)


def test_normalised_pixels_are_the_same(kernels, monkeypatch):
    planes = stream(0, "test").integers(0, 256, (5, 3, 9, 7), dtype=np.uint8)
    results = []
    for loaded in (None, kernels):
        monkeypatch.setattr(compiled, "kernels", lambda size, loaded=loaded: loaded)
        results.append(pixels.normalize(planes, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert np.array_equal(*results)


def seconds(run: Callable[[], object]) -> float:
    """The shortest of several times."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def test_the_loops_use_vector_instructions(kernels):
    """One value after the other, they would be about as fast as Pillow."""
    planes = stream(0, "test").integers(0, 256, (3, 224, 224), dtype=np.uint8)
    source = Image.fromarray(planes.transpose(1, 2, 0).copy())
    turn = seconds(lambda: kernels.turn_hue(address(planes), planes[0].size, 20))
    assert turn < seconds(lambda: pixels.hue(source, 0.08)) / 4


# --------------------------------------------------------------------------------- when, and where


@pytest.fixture
def fresh(monkeypatch) -> None:
    """This process has loaded no kernels so far."""
    monkeypatch.setattr(compiled, "_later", compiled._Later())


def batches(root: Path) -> list[np.ndarray]:
    run = folder_spec(root, workers=0)
    with Pipeline(run, open_train(run)) as pipeline:
        return [view for batch in pipeline.batches(0, 3) for view in batch.views]


def test_batches_do_not_depend_on_the_kernels(kernels, fresh, monkeypatch, tmp_path):
    write_images(tmp_path, [f"{number}.png" for number in range(12)])
    by_pillow = batches(tmp_path)
    assert compiled.kernels(0) is None
    monkeypatch.setattr(compiled, "LATER", 0)
    monkeypatch.setattr(compiled, "_later", compiled._Later())
    for theirs, ours in zip(by_pillow, batches(tmp_path), strict=True):
        assert np.array_equal(theirs, ours)
    assert compiled.kernels(0) is not None


def test_kernels_are_loaded_once_there_is_enough_to_do(kernels, fresh):
    assert compiled.kernels(compiled.LATER) is None
    assert compiled.kernels(1) is compiled.kernels(1) is not None


def test_without_the_packages_pillow_does_it_all(fresh, monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda: False)
    assert compiled.kernels(10 * compiled.LATER) is None
    with compiled.building(10 * compiled.WORTH):  # starts nothing
        assert compiled.load() is None


@pytest.fixture
def elsewhere(kernels, monkeypatch, tmp_path) -> Iterator[Path]:
    """Where the machine code would be in an empty cache folder."""
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    compiled._place.cache_clear()
    yield compiled._place()
    compiled._place.cache_clear()


def test_damaged_machine_code_is_never_run(elsewhere):
    assert compiled.load() is None
    elsewhere.parent.mkdir(parents=True)
    for content in (b"", b"x" * 100):
        elsewhere.write_bytes(content)
        assert compiled.load() is None


def test_a_folder_that_cannot_be_written_is_no_error(elsewhere, tmp_path, capfd):
    (tmp_path / "cache").write_text("a file")
    assert compiled.builder().wait(timeout=60) == 0
    assert capfd.readouterr().err == ""


def test_a_long_run_compiles_beside_its_work_and_leaves_nothing_behind(elsewhere):
    with compiled.building(compiled.WORTH - 1):
        assert not elsewhere.parent.exists()
    with compiled.building(compiled.WORTH):
        end = time.monotonic() + 30
        while not elsewhere.parent.exists() and time.monotonic() < end:
            time.sleep(0.02)
    assert [path.suffix for path in elsewhere.parent.iterdir()] == [".lock"]
