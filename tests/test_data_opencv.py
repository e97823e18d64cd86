"""Views by OpenCV: near to Pillow's, repeatable, and refused in time where OpenCV is missing."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.data_specs import folder_spec, write_images
from test_data_augment import FULL
from test_data_pixels import GOLDEN, with_alpha

from triptych.core.benchmarks.pixels import CASES, differences
from triptych.core.cli import main
from triptych.core.config import spec
from triptych.core.data import Pipeline, augment, open_train, pixels, views
from triptych.core.errors import UserError
from triptych.core.random import stream

opencv = pytest.importorskip(
    "triptych.core.data.opencv", reason="the extra opencv is not installed"
)

NEAR = 1.5
"""Mean difference from Pillow, of 255, of an operation that is no resize to a smaller size."""
ALIASED = 12.0


@pytest.fixture(scope="module")
def gaps() -> dict[str, np.ndarray]:
    return dict(differences())


@pytest.mark.parametrize("name", CASES)
def test_an_operation_is_near_to_that_of_pillow(gaps, name):
    assert gaps[name].mean() < (ALIASED if "smaller" in name else NEAR)
    if name in ("horizontal_flip", "solarize 128"):
        assert not gaps[name].any()


@pytest.mark.parametrize("name", [name for name in CASES if "resize" not in name])
def test_a_forgotten_operation_would_not_be_near(name):
    photograph = Image.fromarray(GOLDEN["smooth"])
    made = np.empty((2, 3, 64, 64), np.uint8)
    crop = partial(pixels.crop_resize, box=(5, 9, 64, 64), size=(64, 64), interpolation="bilinear")
    opencv.write(photograph, [crop, *CASES[name][1:]], made[0])
    opencv.write(photograph, [crop], made[1])
    assert not np.array_equal(*made)


RANDOM = spec.RandAugment(op="rand_augment", p=0.7)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(16, 16), (12, 40)])
def test_views_of_every_mode_are_repeatable_and_near(mode, size):
    image = with_alpha(mode) if mode.endswith("A") else Image.fromarray(GOLDEN["smooth"])
    image = image.convert(mode)
    ops = [*FULL, RANDOM] if mode == "RGB" else FULL
    before = image.tobytes()
    made = np.empty((3, len(mode), *size), np.uint8)
    total = []
    for number in range(20):
        changes = augment.draw(ops, stream(0, "test", number), (image.height, image.width), size)
        for out in made[:2]:
            opencv.write(image, changes, out)
        views.write_by_pillow(image, changes, made[2])
        assert np.array_equal(made[0], made[1])
        colours = made[:, : len(mode.removesuffix("A"))].astype(int)  # the alpha is noise
        total.append(np.abs(colours[0] - colours[2]).mean())
    assert np.mean(total) < ALIASED
    assert image.tobytes() == before


def batches(root: Path, workers: int, engine: str) -> list[np.ndarray]:
    run = folder_spec(root, workers=workers)
    run = run.model_copy(update={"augment": run.augment.model_copy(update={"engine": engine})})
    with Pipeline(run, open_train(run)) as pipeline:
        return [view for batch in pipeline.batches(0, 3) for view in batch.views]


def test_batches_do_not_depend_on_the_workers_and_differ_from_those_of_pillow(tmp_path):
    write_images(tmp_path, [f"{number}.png" for number in range(12)])
    here, there = batches(tmp_path, 0, "opencv"), batches(tmp_path, 2, "opencv")
    assert all(map(np.array_equal, here, there))
    assert not all(map(np.array_equal, here, batches(tmp_path, 0, "pillow")))


def test_without_opencv_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(views.importlib.util, "find_spec", lambda name: None)
    write_images(tmp_path, [f"{number}.png" for number in range(12)])
    with pytest.raises(
        UserError, match=r"^augment.engine: opencv: .*pip install 'triptych\[opencv\]'"
    ):
        batches(tmp_path, 0, "opencv")


def test_the_table_has_a_row_for_each_operation(capsys):
    assert main(["bench", "pixels"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(CASES) and rows[-1].count("|") == 5
