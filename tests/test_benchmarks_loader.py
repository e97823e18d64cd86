"""The loader benchmark compares like with like, and checks its arguments."""

import json
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from conftest import under_test
from PIL import Image
from sklearn.datasets import load_sample_image

from triptych import backends
from triptych.core import config
from triptych.core.benchmarks import loader
from triptych.core.cli import main
from triptych.core.config.spec import Op, RunSpec
from triptych.core.data import augment, pixels
from triptych.core.random import stream

VIEWS = 500
# Exceeded once in a thousand times by equal distributions of so many values each.
CRITICAL = 1.95 * math.sqrt(2 / VIEWS)


@pytest.fixture
def baseline():
    """The module of torchvision's loader, with its generators at a fixed start."""
    if "torch" not in under_test():
        pytest.skip("the baseline is torchvision's, and torch is not under test")
    backends.load("torch")
    import torch

    import triptych.backends.torch.plain.loader as module

    random.seed(0)
    torch.manual_seed(0)
    return module


@pytest.fixture
def spec() -> RunSpec:
    return config.load("moco_v3/vit_small", ["model.image_size=48"])


@pytest.fixture
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg")).resize((160, 107))


def features(make: Callable[[], np.ndarray]) -> np.ndarray:
    """(4, VIEWS): brightness, contrast, colour and detail of views (3, H, W)."""
    rows = []
    for _ in range(VIEWS):
        view = make()
        colour = np.abs(view[0] - view[2]).mean()
        rows.append([view.mean(), view.std(), colour, np.abs(np.diff(view)).mean()])
    return np.array(rows).T


def ours(spec: RunSpec, ops: tuple[Op, ...], image: Image.Image) -> np.ndarray:
    generator, recipe = stream(0, "test"), spec.augment

    def make() -> np.ndarray:
        out = np.empty((3, *spec.model.size), np.uint8)
        pixels.write_planes(augment.view(image, ops, generator, spec.model.size), out)
        return pixels.normalize(out, recipe.mean, recipe.std)

    return features(make)


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Largest gap between the distributions of any feature (Kolmogorov, Smirnov)."""
    gaps = []
    for one, other in zip(a, b, strict=True):
        values = np.union1d(one, other)
        ranks = [np.searchsorted(np.sort(x), values, "right") / len(x) for x in (one, other)]
        gaps.append(np.abs(ranks[0] - ranks[1]).max())
    return max(gaps)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_both_loaders_make_views_of_one_distribution(baseline, spec, photograph, number):
    ops = (spec.augment.view1, spec.augment.view2)[number]
    theirs = features(lambda: baseline.TwoViews(spec)(photograph)[number].numpy())
    assert gap(ours(spec, ops, photograph), theirs) < CRITICAL
    # And a forgotten operation would show: the jitter, or what comes after it in this view.
    for left_out in {"color_jitter", ("gaussian_blur", "solarize")[number]}:
        fewer = tuple(op for op in ops if op.op != left_out)
        assert gap(ours(spec, fewer, photograph), theirs) > CRITICAL, left_out


@pytest.mark.parametrize("workers", [0, 1])
def test_the_benchmark_runs(baseline, monkeypatch, capsys, workers):
    monkeypatch.setattr(loader, "FILES", 8)
    arguments = f"--workers {workers} --batch 4 --images 8 --rounds 2 --json".split()
    assert main(["bench", "loader", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    speeds = found["images_per_second_per_core"]
    assert set(speeds) == {"triptych", "torchvision"} and min(speeds.values()) > 0
    assert len(found["ratios"]) == 2 and min(found["ratios"]) <= found["ratio"]
    assert found["rounds"] == 2 and found["threads"] == 1
    assert {"python", "pillow", "torchvision"} <= found["versions"].keys()
    assert found["cores"] == 1 and found["image_size"] == [224, 224]


@pytest.mark.parametrize(
    "bad", [["--workers", "-1"], ["--batch", "1"], ["--batch", "9999"], ["--rounds", "0"]]
)
def test_bad_arguments_are_refused(bad, capsys):
    assert main(["bench", "loader", *bad]) == 2
    assert capsys.readouterr().err.startswith(f"error: {bad[0]} {bad[1]}: expected")
