"""Encoders as ONNX files: what they compute, and what is refused."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.test_api import SMALL, classifier_file
from triptych import backends, core
from triptych.core import config
from triptych.core.errors import UserError
from triptych.core.parameters import initial_state
from triptych.core.sharing import exporting

RESNET = ("model.width=2", "model.image_size=16", "method.queue_size=256", "threads=1")
RUNTIME = "onnxruntime"


@pytest.fixture
def exportable(backend, backend_name: str) -> str:
    """A backend that has all packages of its exporter."""
    if backend_name not in backends.EXPORTERS:
        pytest.skip(f"{backend_name} has no exporter that works")
    extra, packages = backends.EXPORTERS[backend_name]
    for package in (*packages, RUNTIME):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is missing: pip install 'triptych[{extra}]'")
    return backend_name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["moco_v3/digits", "moco_v2/digits"])
def test_a_file_computes_the_features_of_any_number_of_images(exportable, tmp_path, recipe):
    small = SMALL if "v3" in recipe else RESNET
    model = core.get_model(recipe, exportable, overrides=small)
    done = core.export(model, tmp_path / "x.onnx", branch="teacher")
    assert done.outputs == ("features",) and done.difference < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]
    session = importlib.import_module(RUNTIME).InferenceSession(done.path)
    images = np.random.default_rng(1).standard_normal((5, 1, *model.spec.model.size))
    (found,) = session.run(None, {"images": images.astype(np.float32)})
    np.testing.assert_allclose(found, model.encode(images, branch="teacher"), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_file_of_a_classifier_gives_its_logits(exportable, tmp_path):
    path = classifier_file(tmp_path, name="finetune", momentum=0.99, pooling="mean")
    state = initial_state(config.load(path))
    rng = np.random.default_rng(3)
    state |= {n: rng.standard_normal(a.shape) for n, a in state.items() if ".classifier." in n}
    np.savez(tmp_path / "w.npz", **state)
    model = core.get_model(path, exportable, tmp_path / "w.npz")
    done = core.export(model, tmp_path / "x.onnx")
    assert done.outputs == ("logits",) and done.difference < 1e-5
    session = importlib.import_module(RUNTIME).InferenceSession(done.path)
    images = rng.standard_normal((4, 1, 16, 16)).astype(np.float32)
    (logits,) = session.run(["logits"], {"images": images})
    best = [each.labels[0] for each in model.predict(images, top=1)]  # of the averaged weights
    assert logits.argmax(axis=1).tolist() == best


def test_a_backend_without_exporter_names_those_with_one(tmp_path):
    model = core.get_model("moco_v3/digits", "numpy", overrides=SMALL)
    with pytest.raises(UserError, match=r"numpy has no exporter.* backend torch or paddle"):
        core.export(model, tmp_path / "x.onnx")
    with pytest.raises(UserError, match=r"x\.pb: expected a name that ends in \.onnx"):
        core.export(model, tmp_path / "x.pb")
    with pytest.raises(UserError, match="export: oneflow has no exporter that works"):
        backends.exporter("oneflow")


@pytest.mark.parametrize("name", backends.EXPORTERS)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda package: None)
    extra, packages = backends.EXPORTERS[name]
    said = f"{packages[-1]} not installed; run: pip install 'triptych\\[{extra}\\]'"
    with pytest.raises(UserError, match=said):
        backends.exporter(name)


class _Session:
    """Runs no file: the outputs are the sum of each image's pixels, times a factor."""

    factor = 1.0

    def __init__(self, path: str, providers: list[str]) -> None:
        """Opens nothing."""

    def run(self, names, inputs):
        return [inputs["images"].sum(axis=(1, 2, 3)) * self.factor for _ in names]


@pytest.mark.parametrize(("factor", "difference"), [(1.0, 0.0), (1.5, 0.5), (np.nan, np.nan)])
def test_the_difference_is_the_largest_of_all_outputs(monkeypatch, tmp_path, factor, difference):
    monkeypatch.setitem(sys.modules, RUNTIME, SimpleNamespace(InferenceSession=_Session))
    monkeypatch.setattr(_Session, "factor", factor)
    images = np.arange(12.0).reshape(3, 1, 2, 2)
    sums, zeros = images.sum(axis=(1, 2, 3)), np.zeros((1, 1, 2, 2))
    expected = [(images, {"a": sums, "b": sums}), (zeros, {"a": np.zeros(1)})]
    found = exporting._difference(tmp_path / "x.onnx", expected)
    assert found == pytest.approx(difference, nan_ok=True)
    monkeypatch.setitem(sys.modules, RUNTIME, None)
    assert exporting._difference(tmp_path / "x.onnx", expected) is None


class _Exporter:
    """Writes a file, and beside it the weights as for more than 2 GiB."""

    @staticmethod
    def write(engine, branch, path, names, *, logits) -> None:
        path.write_text(f"{names} {logits}")
        path.with_name(f"{path.name}.data").write_text("weights")


@pytest.mark.parametrize("difference", [None, 1e-6, 0.1, float("nan")])
def test_a_file_that_computes_something_else_replaces_nothing(monkeypatch, tmp_path, difference):
    monkeypatch.setattr(backends, "exporter", lambda name: _Exporter)
    monkeypatch.setattr(exporting, "_difference", lambda file, expected: difference)
    model = core.get_model("moco_v3/digits", "numpy", overrides=SMALL)
    path = tmp_path / "x.onnx"
    path.write_text("the earlier one")
    if difference in (None, 1e-6):
        assert core.export(model, path) == (path, ("features",), difference)
        assert path.read_text() == "('features',) False"
        assert {each.name for each in tmp_path.iterdir()} == {"x.onnx", "x.onnx.data"}
    else:
        with pytest.raises(UserError, match=r"the outputs differ by .* from the encoder's"):
            core.export(model, path)
        assert path.read_text() == "the earlier one" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="cannot write: No such file"):
        core.export(model, tmp_path / "none" / "x.onnx")
