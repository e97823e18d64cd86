"""One set of weights on every framework: the same accuracy to the last image (``make soak``)."""

import json

import pytest
from conftest import requested

from triptych import backends
from triptych.core import config
from triptych.core.cli import main
from triptych.core.runs.log import read_rows
from triptych.core.training import run

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
PROBES = {"moco_v3/digits": "moco_v3/digits_linear", "moco_v2/digits": "moco_v2/digits_linear"}
"""Recipe of a ViT and of a ResNet -> recipe of its linear probe."""
STEPS = ["train.steps=100", "log.tensorboard=false", "threads=1"]
SCORES = ("top1", "top5", "each", "grid")
"""What has to be equal in the rows of an evaluation."""


@pytest.fixture(scope="module")
def names():
    return requested() or backends.installed()


@pytest.fixture(scope="module", params=PROBES)
def pretrained(request, names, tmp_path_factory):
    """A recipe, and the folder of its run of a hundred steps."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    spec = config.load(request.param, [*STEPS, "evaluate.every=0", "optim.warmup_steps=10"])
    assert run.train(spec, names[0], folder, say=lambda text: None) is None
    return request.param, folder


def scores(rows):
    """The rows of an evaluation, without what is no score."""
    return [{key: row[key] for key in SCORES if key in row} for row in rows]


def compare(found):
    """Fails unless all frameworks have the scores of the first one."""
    first, *others = found.items()
    print(first[0], json.dumps(first[1]))
    for name, rows in others:
        assert rows == first[1], f"{name} and {first[0]}"


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("protocol", ["knn", "lowshot", "probe"])
def test_protocols_of_features(pretrained, names, protocol, precision, capsys):
    recipe, folder = pretrained
    found = {}
    for name in names:
        words = ["eval", protocol, "-c", recipe, "--weights", str(folder), "--json"]
        words += ["--backend", name, "-o", f"precision={precision}", "threads=1"]
        words += ["evaluate.k=[5,20]", "evaluate.lowshot.shots=[1,5,10%]"]
        assert main(words) == 0
        found[name] = scores(json.loads(capsys.readouterr().out))
    with capsys.disabled():
        print(f"\n{recipe} {protocol} {precision}:", end=" ")
        compare(found)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("features", ["augmented", "cached"])
def test_linear_probes(pretrained, names, features, precision, tmp_path, capsys):
    recipe, folder = pretrained
    keys = [*STEPS, f"init.weights={folder}", f"method.features={features}"]
    spec = config.load(PROBES[recipe], [*keys, f"precision={precision}", "evaluate.every=100"])
    found = {}
    for name in names:
        assert run.train(spec, name, tmp_path / name, say=lambda text: None) is None
        rows = [row for row in read_rows(tmp_path / name / "metrics.jsonl") if "eval" in row]
        found[name] = [
            {**score, "heads": [(head["top1"], head["top5"]) for head in row["heads"]]}
            for score, row in zip(scores(rows), rows, strict=True)
        ]
    with capsys.disabled():
        print(f"\n{recipe} linear, {features} {precision}:", end=" ")
        compare(found)
