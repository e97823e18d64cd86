"""Random erasing: golden draws replayed, and our own draws."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.scripted import Scripted

from triptych.core.config import spec
from triptych.core.data import erasing
from triptych.core.random import stream

GOLDEN = Path(__file__).parent / "golden/eval"
ARRAYS = np.load(GOLDEN / "finetune_batch.npz")
RUNS = json.loads((GOLDEN / "finetune_batch.json").read_text())["erase"]["runs"]
PIPELINES = np.load(GOLDEN / "randaugment.npz")
SAMPLES = json.loads((GOLDEN / "randaugment.json").read_text())["pipeline"]["samples"]
DATA = spec.AugmentSpec()


def erase(**keys) -> spec.RandomErase:
    return spec.RandomErase(op="random_erase", **keys)


@pytest.mark.parametrize("name", RUNS)
def test_golden_draws_give_the_golden_boxes(name):
    run = RUNS[name]
    args, image = run["args"], ARRAYS[f"erase/{run['image']}"].copy()
    op = erase(
        p=args["probability"],
        mode=args["mode"],
        area=(0.02, args["max_area"]),
        count=(args["min_count"], args["max_count"]),
    )
    generator = Scripted(run["draws"])
    for number, box in enumerate(erasing.boxes(op, generator, image.shape[1:])):
        image[box.place] = ARRAYS[f"erase/{name}/fill{number}"]
    assert generator.left == []
    np.testing.assert_array_equal(image, ARRAYS[f"erase/{name}/out"])


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_golden_pipelines_end_with_the_golden_boxes(number):
    image = PIPELINES[f"pipeline/{number}/normalize"]
    draws = [draw[1:] for draw in SAMPLES[number]["draws"] if draw[0] == "erase"]
    changed = (image != PIPELINES[f"pipeline/{number}/erase"]).any(axis=0)
    wanted = np.zeros_like(changed)
    for box in erasing.boxes(erase(), Scripted(draws), image.shape[1:]):
        wanted[box.place[1:]] = True
    np.testing.assert_array_equal(changed, wanted)


def finished(op: spec.RandomErase | None, count: int = 400, **keys) -> np.ndarray:
    """Erased views of grey images, (count, 3, 24, 30)."""
    planes = np.full((count, 3, 24, 30), 124, np.uint8)
    data = spec.AugmentSpec(**keys)
    return erasing.normalized(
        planes, data, (op,) if op else (), lambda row: stream(1, "test/erase", row)
    )


def test_each_pixel_gets_noise_of_its_own():
    views, plain = finished(erase(p=0.3)), finished(None)
    changed = views != plain
    assert changed.any(axis=(1, 2, 3)).mean() == pytest.approx(0.3, abs=0.06)
    assert (changed.any(axis=1) == changed.all(axis=1)).all()
    noise = views[changed]
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert len(np.unique(noise)) > 0.9 * noise.size
    area = changed[changed.any(axis=(1, 2, 3))].any(axis=1).mean(axis=(1, 2))
    assert (area.min(), area.max()) == pytest.approx((0.02, 1 / 3), abs=0.02)


@pytest.mark.parametrize("mode", ["rand", "const"])
def test_a_box_may_get_one_color(mode):
    views = finished(erase(p=1.0, mode=mode), count=5)
    for view in views:
        inside = view[:, (view != finished(None, 1)[0]).any(axis=0)]
        assert len(np.unique(inside, axis=1).T) == 1
        assert (inside == 0).all() == (mode == "const")


def test_several_boxes_share_the_area():
    op = erase(p=1.0, count=(3, 3), area=(0.3, 0.3))
    found = [erasing.boxes(op, stream(2, "test", n), (60, 60)) for n in range(50)]
    assert {len(boxes) for boxes in found} == {3}
    areas = [box.height * box.width / 3600 for boxes in found for box in boxes]
    assert np.mean(areas) == pytest.approx(0.1, abs=0.005)


def test_a_box_that_never_fits_is_left_out_or_cut():
    kinds = {"area": (1.0, 1.0), "ratio": (0.2, 0.2), "p": 1.0}
    assert erasing.boxes(erase(**kinds), stream(3, "test"), (10, 10)) == []
    (box,) = erasing.boxes(erase(**kinds, fit="cut"), stream(3, "test"), (10, 10))
    assert (box.height, box.width, box.left) == (4, 10, 0)


def test_pixels_are_erased_before_the_normalisation():
    keys = {"mean": [0.5], "std": [0.2]}
    op = erase(p=1.0, values="pixels", area=(0.5, 0.5), ratio=(1.0, 1.0))
    views = finished(op, **keys)
    changed = np.abs(views - (124 / 255 - 0.5) / 0.2) > 1e-5
    pixels = (views[changed] * 0.2 + 0.5) * 255
    np.testing.assert_allclose(pixels, np.round(pixels), rtol=0, atol=1e-3)
    assert pixels.min() > -1e-3
    assert pixels.max() < 255 + 1e-3
    assert pixels.mean() == pytest.approx(127, abs=1)
    assert pixels.std() == pytest.approx(51, abs=1.5)


def test_pixels_are_cut_towards_zero_and_to_their_range():
    image = np.zeros((1, 1, 4), np.uint8)
    noise = np.array([[[0.0, 10.0, -10.0, 0.0199]]], np.float32)
    erasing.write_pixels(image, [(erasing.Box(0, 0, 1, 4), noise)], [0.5], [0.2])
    assert image.ravel().tolist() == [127, 255, 0, 128]
