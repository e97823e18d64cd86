"""Linear probe and fine-tuning over a hundred steps on every framework: ``make soak``."""

import itertools

import numpy as np
import pytest
import yaml
from conftest import TOLERANCE, requested
from support import kills
from test_training_supervised import RUNS as SHORT
from test_training_supervised import settings

from triptych import backends
from triptych.core.config.spec import RunSpec
from triptych.core.runs.log import read_rows
from triptych.core.training import run

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
STEPS, LEG, KILLS = 100, 34, 5
RUNS = {
    **SHORT,
    "probe_resnet": {
        "model": SHORT["finetune_resnet"]["model"],
        "method": {"name": "linear", "rates": [1.0, 0.1]},
        "optim": {"name": "sgd", "lr": 1.0},
    },
}
SWEEP = [0.01, 0.03, 0.1, 0.3, 1.0]
"""Rates of the probes with several classifiers."""
CALM = {"finetune_resnet": 0.02}
"""Rates of the runs that are too restless: at 0.1 this one turns a change of the weights by 2^-50
into 2e-10 of the loss on a single framework."""
CURVE = TOLERANCE["float64"]["curve"]


def long(name, **train):
    """The tree of a run of a hundred steps on the digits, with these keys of its section train."""
    given = settings(name, RUNS)
    given["train"] |= {"steps": STEPS, **train}
    given["checkpoint"]["every"] = 0
    given["optim"]["lr"] = CALM.get(name, given["optim"]["lr"])
    if "rates" in given["method"]:
        given["method"]["rates"] = SWEEP
    return given


def curves(given, backend_name, folder, resume=None):
    """Trains. Returns the losses of the steps, and of each classifier of a probe: (steps, n)."""
    spec = RunSpec.model_validate(given)
    assert run.train(spec, backend_name, folder, resume=resume, say=lambda text: None) is None
    rows = read_rows(folder / "metrics.jsonl")
    losses = [name for name in rows[0] if name.partition("_")[0] == "loss"]
    return np.array([[row[name] for name in losses] for row in rows])


def largest(found, wanted):
    """The largest relative difference of any step."""
    assert found.shape == wanted.shape
    return np.abs(found / wanted - 1).max()


def test_a_difference_of_one_step_is_seen():
    curve = np.ones((STEPS, 2))
    other = curve.copy()
    other[57, 1] += 1.1 * CURVE
    assert largest(curve, curve) == 0 and largest(other, curve) > CURVE


@pytest.fixture(scope="module")
def names():
    return requested() or backends.installed()


@pytest.fixture(scope="module")
def whole(names, tmp_path_factory):
    """Name of a run -> the curves of all frameworks."""
    found = {}

    def make(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            found[name] = {of: curves(long(name), of, folder / of) for of in names}
        return found[name]

    return make


@pytest.mark.parametrize("name", RUNS)
def test_every_framework_draws_the_same_long_curve(whole, name):
    for (one, a), (other, b) in itertools.combinations(whole(name).items(), 2):
        assert len(a) == STEPS and a[-1].mean() < a[0].mean()
        error = largest(a, b)
        print(f"{name}: {one} and {other}: {error:.1e}")
        assert error <= CURVE, (name, one, other)


@pytest.mark.parametrize("name", RUNS)
def test_a_long_run_goes_round_all_frameworks(names, whole, name, tmp_path):
    """torch, oneflow, paddle: the second and the third go on with the checkpoint of the former."""
    previous = None
    for leg, of in enumerate(names, 1):
        stop = min(leg * LEG, STEPS) if leg < len(names) else STEPS
        folder = tmp_path / of
        found = curves(long(name, stop_at=stop), of, folder, resume=previous)
        previous = str(folder)
    for of, wanted in whole(name).items():
        error = largest(found, wanted)
        print(f"{name}: relay and {of}: {error:.1e}")
        assert error <= CURVE, (name, of)


@pytest.mark.parametrize("name", RUNS)
def test_kills_change_no_bit(backend, backend_name, name, tmp_path, monkeypatch):
    """SIGKILL at a random moment, then --resume auto."""
    given = long(name)
    given["checkpoint"]["every"] = 7
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    monkeypatch.setattr(kills, "SMALL", ())
    words = ["--backend", backend_name, "-c", str(tmp_path / "run.yaml"), "--kills", str(KILLS)]
    words += ["--steps", str(STEPS), "--workers", "0", "--output", str(tmp_path / "soak")]
    assert kills.main(words) == 0
