"""Model folders of the Hugging Face Hub, against a stand-in for its library, and their cards."""

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.test_api import SMALL, classifier_file
from triptych import core
from triptych.core import checkpoint, cli, config, published
from triptych.core.errors import UserError
from triptych.core.parameters import initial_state
from triptych.core.published import hub
from triptych.core.published.hub import Address

ROWS = [
    {"step": 1, "loss": 4.5, "chance": 4.1, "state": "starting"},
    {"step": 360, "loss": 1.25, "chance": 4.1, "state": "learning"},
    *(
        {"eval": "knn", "step": step, "k": 20, "temperature": 0.07, "top1": top1, "labels": labels}
        for step, top1, labels in ((180, 0.5, "all"), (360, 0.8125, "all"), (360, 0.5, 10))
    ),
]
RESULT = {"backend": "paddle", "versions": {"paddle": "3.3.1"}, "device": "cpu", "seconds": 61.0}


class Library(ModuleType):
    """What is used of huggingface_hub. A model is a folder below ``models``.

    Attributes:
        calls: what the functions were called with.
        failure: raised by every call; None: nothing is.
    """

    class HfHubHTTPError(RuntimeError, OSError):
        """The library's error, as of a server's answer."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.models, self.cache = folder / "models", folder / "cache"
        self.calls: list[dict[str, object]] = []
        self.failure: Exception | None = None

    def _called(self, **options: object) -> None:
        self.calls.append(options)
        if self.failure:
            raise self.failure

    def create_repo(self, **options) -> None:
        self._called(**options)
        (self.models / options["repo_id"]).mkdir(parents=True, exist_ok=options["exist_ok"])

    def upload_folder(self, **options) -> str:
        self._called(**options)
        target = self.models / options["repo_id"]
        shutil.copytree(options["folder_path"], target, dirs_exist_ok=True)
        return f"https://hub/{options['repo_id']}/commit/1"

    def snapshot_download(self, **options) -> str:
        self._called(**options)
        target = self.cache / options["repo_id"]
        target.mkdir(parents=True, exist_ok=True)
        for file in (self.models / options["repo_id"]).iterdir():
            if any(fnmatch(file.name, pattern) for pattern in options["allow_patterns"]):
                shutil.copy(file, target)
        return str(target)


@pytest.fixture
def library(tmp_path, monkeypatch) -> Library:
    stub = Library(tmp_path)
    errors = SimpleNamespace(HfHubHTTPError=Library.HfHubHTTPError)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return stub


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a finished run, with two evaluations and a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    root = "data.class_names=/home/somebody/lists/classes.txt"
    spec = config.load("moco_v3/digits", [*SMALL, "seed=5", root])
    (folder / "spec.yaml").write_text(config.dump(spec))
    lines = [json.dumps(row) for row in ROWS]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "result.json").write_text(json.dumps(RESULT))
    state = {**initial_state(spec), "optimizer.step": np.array(360)}
    checkpoint.write(folder, 360, state, spec, {}, keep=1)
    return folder


def test_a_run_is_pushed_and_opened_by_its_address_alone(library, run, tmp_path):
    url = core.push(run, "hf://somebody/digits", private=True)
    assert url == "https://hub/somebody/digits/commit/1"
    made, uploaded = library.calls
    assert made == {"repo_id": "somebody/digits", "private": True, "exist_ok": True}
    assert uploaded["commit_message"] == f"moco_v3 by triptych {core.__version__}"
    folder = library.models / "somebody" / "digits"
    files = {"README.md", "config.json", "model.safetensors", "spec.yaml"}
    assert {path.name for path in folder.iterdir()} == files
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == initial_state(config.load(run / "spec.yaml")).keys()
    for path in folder.iterdir():
        assert b"/home/" not in path.read_bytes()
    about = json.loads((folder / "config.json").read_text())
    assert about["spec"]["data"]["class_names"] == "classes.txt"
    there = core.get_model(weights="hf://somebody/digits@v1", backend="numpy")
    here = core.get_model(run / "spec.yaml", "numpy", run)
    assert library.calls[-1]["revision"] == "v1"
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16), np.uint8)
    np.testing.assert_array_equal(there.encode(images), here.encode(images))
    # The encoder of a model that came from the Hub is pushed like any other.
    assert core.push(there, "hf://somebody/copy@main", message="again") == url.replace(
        "digits", "copy"
    )
    assert library.calls[-1]["revision"] == "main"
    assert library.calls[-1]["commit_message"] == "again"
    copy = load_file(library.models / "somebody" / "copy" / "model.safetensors")
    assert all(np.array_equal(array, stored[name]) for name, array in copy.items())


def test_the_card_says_what_the_model_is_and_how_good(run):
    text = core.model_card(run, "somebody/digits")
    _, head, body = text.split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["library_name"] == "triptych" and "moco_v3" in about["tags"]
    assert about["pipeline_tag"] == "image-feature-extraction"
    for line in (
        "# digits",
        'get_model(weights="hf://somebody/digits").encode(images)   # (N, D)',
        "| method | moco_v3 |",
        "| images | 16 x 16, 1 channels |",
        "| data set | digits |",
        "| normalised by | mean 0.305; deviation 0.376 |",
        "| length | 360 steps |",
        "| loss | 4.5 at step 1, 1.25 at step 360 |",
        "| backend | paddle (paddle 3.3.1) |",
        "| time | 61 s |",
        "| k-NN all labels | trained | 360 | top-1 | held-out images | 81.25 % |",
    ):
        assert line in body.splitlines(), line
    assert "50.00" not in text and "/home/" not in text
    spec = body.partition("```yaml\n")[2].partition("```")[0]
    assert config.loads(spec, "card").train.steps == 360


def test_the_card_of_a_classifier_predicts_and_says_that_nothing_was_measured(tmp_path):
    path = classifier_file(tmp_path, name="linear")
    text = core.model_card(core.get_model(path, "numpy"))
    assert 'get_model(weights="hf://OWNER/NAME").predict(images)' in text
    assert "pipeline_tag: image-classification" in text
    assert "No evaluation has been recorded." in text


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://a/b", Address("a/b", None)),
        ("hf://a-1/b_2.c@refs/pr/1", Address("a-1/b_2.c", "refs/pr/1")),
        (str(Path("hf://a/b@v1")), Address("a/b", "v1")),
        ("moca_vitb16_v1.0", None),
        ("/hf:/a/b", None),
    ],
)
def test_addresses(text, address):
    assert hub.parse(text) == address


@pytest.mark.parametrize("text", ["hf://a", "hf://a/b/c", "hf://../b@", "hf://a/b@v 1", "hf://"])
def test_a_wrong_address_is_refused(text):
    with pytest.raises(UserError, match="expected hf://owner/name"):
        published.local(text)


def test_weights_that_are_no_safetensors_come_if_there_are_no_others(library):
    folder = library.models / "a" / "b"
    folder.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin", "flax_model.msgpack"):
        (folder / name).touch()
    assert {path.name for path in published.local("hf://a/b").iterdir()} == {
        "config.json",
        "pytorch_model.bin",
    }
    assert len(library.calls) == 2
    (folder / "model.safetensors").touch()
    assert published.local("hf://a/b").exists() and len(library.calls) == 3


def test_what_fails_is_one_line(library, run, tmp_path, capsys, monkeypatch):
    for failure in (
        Library.HfHubHTTPError("401 Client Error.\n\nRepository Not Found"),
        RuntimeError("no route"),  # of the library for HTTP
        ValueError("the name is too long"),
    ):
        library.failure = failure
        said = str(failure).splitlines()[0]
        for call in (lambda: core.push(run, "hf://a/b"), lambda: published.local("hf://a/b")):
            with pytest.raises(UserError, match=f"hf://a/b: {said}; check the name, the") as caught:
                call()
            assert "\n" not in str(caught.value)
    assert cli.main(["eval", "knn", "-c", "moco_v3/digits", "--weights", "hf://a/b"]) == 2
    assert "error: hf://a/b: the name is too long" in capsys.readouterr().err
    with pytest.raises(UserError, match="push: runs/x: expected hf://owner/name"):
        core.push(run, "runs/x")
    untrained = core.get_model("moco_v3/digits", "numpy", overrides=SMALL)
    with pytest.raises(UserError, match="push: the encoder has its initial values"):
        core.push(untrained, "hf://a/b")
    with pytest.raises(UserError, match=r"no spec\.yaml there"):
        core.push(tmp_path, "hf://a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"not installed; run: pip install 'triptych\[hub\]'"):
        core.push(run, "hf://a/b")


def test_the_library_takes_what_it_is_called_with(library, run):
    """The real one, where it is installed, has these functions with these keywords."""
    core.push(run, "hf://a/b")
    published.local("hf://a/b")
    del sys.modules["huggingface_hub"], sys.modules["huggingface_hub.errors"]
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is missing: pip install 'triptych[hub]'")
    real = importlib.import_module("huggingface_hub")
    functions = (real.create_repo, real.upload_folder, real.snapshot_download)
    for function, options in zip(functions, library.calls, strict=True):
        inspect.signature(function).bind(**options)


def test_the_library_itself_fails_in_one_line_without_network(tmp_path):
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is missing: pip install 'triptych[hub]'")
    code = "from triptych.core.published import local; local('hf://somebody/absent@v1')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    last = done.stderr.splitlines()[-1]
    assert re.search(r"UserError: hf://somebody/absent: .+; check the name, the network", last)
