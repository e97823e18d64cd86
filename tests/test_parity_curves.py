"""One curve on every framework, and one run handed from framework to framework: `make soak`.

The recipes are the real ones, as long as DESIGN asks: 100 steps, or four times 25.
"""

import itertools

import numpy as np
import pytest
from conftest import TOLERANCE, assert_close, requested

from triptych import backends
from triptych.core import checkpoint, config
from triptych.core.commands.demo import short_recipes
from triptych.core.runs.log import read_rows
from triptych.core.training import run

KEYS = [
    "precision=float64",
    "train.steps=100",
    "optim.warmup_steps=10",  # a recipe's own may be longer than that
    "log.every=1",
    "evaluate.every=0",
    "threads=1",
]
LEG = 25
pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


def train(recipe, name, folder, *overrides, resume=None):
    spec = config.load(recipe, [*KEYS, *overrides])
    assert run.train(spec, name, folder, resume=resume, say=lambda text: None) is None
    rows = read_rows(folder / "metrics.jsonl")
    return np.array([row["loss"] for row in rows])


@pytest.fixture(scope="module")
def names():
    return requested() or backends.installed()


@pytest.fixture(scope="module", params=short_recipes())
def recipe(request):
    return request.param


@pytest.fixture(scope="module")
def curves(recipe, names, tmp_path_factory):
    """Backend -> (folder, loss of each of 100 uninterrupted steps)."""
    folders = {name: tmp_path_factory.mktemp(name) / "run" for name in names}
    return {name: (folder, train(recipe, name, folder)) for name, folder in folders.items()}


def test_every_framework_draws_the_same_curve(recipe, curves):
    for (one, (_, a)), (other, (_, b)) in itertools.combinations(curves.items(), 2):
        assert len(a) == 100
        error = np.abs(a - b).max() / np.abs(b).max()
        print(f"{recipe}: {one} and {other}: {error:.1e}")
        assert_close(a, b, TOLERANCE["float64"]["curve"], f"{recipe}: {one} and {other}")


def test_a_run_goes_round_all_frameworks(recipe, names, curves, tmp_path):
    """torch -> oneflow -> paddle -> torch, 25 steps each, against 100 uninterrupted ones."""
    whole, expected = curves[names[0]]
    previous = None
    for leg, name in enumerate([*names, names[0]][:4], 1):
        folder = tmp_path / f"{leg}-{name}"
        loss = train(recipe, name, folder, f"train.stop_at={leg * LEG}", resume=previous)
        previous = str(folder)
    assert_close(loss, expected[: len(loss)], TOLERANCE["float64"]["curve"], recipe)
    found, wanted = (checkpoint.read(checkpoint.latest(path, print))[1] for path in (folder, whole))
    if len(loss) == len(expected):
        for name in ("student.encoder.norm.weight", "teacher.encoder.norm.weight"):
            if name in wanted:
                assert_close(found[name], wanted[name], TOLERANCE["float64"]["state"], name)


def test_another_seed_is_another_curve(names, curves, recipe, tmp_path):
    _, expected = curves[names[0]]
    loss = train(recipe, names[0], tmp_path / "run", "seed=1", "train.stop_at=3")
    with pytest.raises(AssertionError):
        assert_close(loss, expected[:3], TOLERANCE["float64"]["curve"])
