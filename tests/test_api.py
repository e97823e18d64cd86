"""The Python interface: names, weights, and images in every form a user has them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych import core
from triptych.core import checkpoint, config
from triptych.core.api import Encoder
from triptych.core.config import ALIASES
from triptych.core.data import evaluation_batches, open_train
from triptych.core.data.names import TABLES
from triptych.core.errors import UserError
from triptych.core.launch import open_encoder, open_engine
from triptych.core.parameters import initial_state

SMALL = (
    "data.workers=0",
    "model.width=8",
    "model.depth=1",
    "model.heads=2",
    "method.hidden_dim=8",
    "precision=float64",
)


@pytest.fixture
def encoder(backend, backend_name: str) -> Encoder:
    return core.get_model("moco_v3/digits", backend_name, overrides=SMALL)


def digits(count: int) -> np.ndarray:
    source = open_train(config.load("moco_v3/digits"))
    return np.stack([np.asarray(source.image(i)) for i in range(count)])


def test_the_interface_loads_no_framework_before_it_must() -> None:
    code = (
        "import sys; from triptych import core; core.list_models(); "
        "assert not {'torch', 'oneflow', 'paddle'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_models_are_listed_by_pattern() -> None:
    names = core.list_models()
    assert set(config.recipes()) | set(ALIASES) == set(names) and "moco_v3/digits" in names
    assert core.list_models("*vit-small*") == [
        "mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k",
        "vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k",
    ]
    assert core.list_models("none*") == []
    with pytest.raises(AttributeError, match="no_such_thing"):
        core.no_such_thing  # noqa: B018


def test_a_recipe_in_mixed_precision_infers_in_float32_on_every_backend(backend, backend_name):
    features = [
        core.get_model("moco_v3/digits", backend_name, overrides=(*SMALL, *change)).encode(
            digits(4)
        )
        for change in (["precision=bfloat16", "train.compile=true"], ["precision=float32"])
    ]
    assert features[0].dtype == np.float32
    np.testing.assert_array_equal(*features)


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_a_recipe_of_that_size(alias: str) -> None:
    spec = config.load(ALIASES[alias])
    if "_pt_in1k" not in alias:  # PaddleFleetX names neither
        assert spec.model.name.removeprefix("vit_") in alias
        assert f"-{spec.train.epochs}e_" in alias
    # The folder of a recipe is the method of the pretraining.
    method = ALIASES[alias].partition("/")[0]
    assert method.replace("_", "") in alias.replace("_", "")
    assert ("linear" in alias) == (spec.method.name == "linear")
    assert ("-pre_" in alias) == (spec.method.name in ("linear", "finetune"))
    assert config.load(alias) == spec


def test_a_residual_network_encodes_as_well(backend, backend_name: str) -> None:
    small = (
        "model.width=2",
        "model.image_size=16",
        "method.queue_size=256",
        "precision=float64",
        "threads=1",
    )
    encoder = core.get_model("moco_v2/digits", backend_name, overrides=small)
    images = digits(5)
    features = encoder.encode(images)
    assert features.shape == (5, 16)
    # The feature is the mean over the positions of the last map: two by two here.
    every = encoder.encode(images, tokens="all")
    assert every.shape == (5, 1 + 4, 16)
    np.testing.assert_allclose(every[:, 1:].mean(1), features, rtol=1e-12)
    np.testing.assert_array_equal(every[:, 0], features)


def test_images_in_any_form_have_the_same_features(encoder: Encoder, tmp_path: Path) -> None:
    """And these are the features that evaluation sees."""
    pixels = digits(5)
    pictures = [Image.fromarray(each) for each in pixels]
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    ((batch, _),) = evaluation_batches(encoder.spec, _First(5), 5)
    engine = open_engine(encoder.spec, encoder.backend, initial_state(encoder.spec))
    expected = engine.embed(batch)["final"]
    assert expected.shape == (5, 8) and expected.dtype == np.float64
    assert np.ptp(expected, axis=0).max() > 0
    colour = np.repeat(pixels[..., None], 3, axis=3)
    for images in (
        pixels,
        pixels[..., None],
        pictures,
        paths,
        [str(p) for p in paths],
        batch,
        colour,
    ):
        np.testing.assert_allclose(encoder.encode(images), expected, rtol=1e-10, atol=1e-12)
    for size in (1, 2, 5):
        parts = encoder.encode(pixels, batch_size=size)
        np.testing.assert_allclose(parts, expected, rtol=1e-10, atol=1e-12)
    for single in (paths[3], str(paths[3]), pictures[3]):
        np.testing.assert_allclose(encoder.encode(single), expected[3:4], rtol=1e-10, atol=1e-12)
    one = core.inference_model(encoder, paths[3])
    np.testing.assert_allclose(one["features"], expected[3], rtol=1e-10, atol=1e-12)
    one = core.inference_model(encoder, pixels[3])
    np.testing.assert_allclose(one["features"], expected[3], rtol=1e-10, atol=1e-12)


class _First:
    """The first digits, as a source."""

    def __init__(self, count: int) -> None:
        self.source, self.count = open_train(config.load("moco_v3/digits")), count

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Image.Image:
        return self.source.image(index)

    def label(self, index: int) -> int:
        return self.source.label(index)


def test_branch_and_tokens_are_those_asked_for(backend, backend_name: str, tmp_path: Path) -> None:
    spec = config.load("moco_v3/digits", SMALL)
    state = initial_state(spec)
    state["teacher.encoder.cls_token"] = np.linspace(1, 0, 8).reshape(1, 1, 8)
    np.savez(tmp_path / "w.npz", **state)
    model = core.get_model("moco_v3/digits", backend_name, tmp_path / "w.npz", overrides=SMALL)
    pixels = digits(2)
    student, teacher = (model.encode(pixels, branch=b) for b in ("student", "teacher"))
    everything = model.encode(pixels, tokens="all")
    assert np.abs(student - teacher).max() > 0.1
    assert everything.shape == (2, 17, 8)
    np.testing.assert_allclose(everything[:, 0], student, rtol=1e-10)
    mean = model.encode(pixels, tokens="mean")
    np.testing.assert_allclose(everything[:, 1:].mean(1), mean, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("recipe", ["moco_v3/digits", "moco_v2/digits", "moca/digits"])
def test_an_encoder_alone_is_that_of_the_whole_run(backend, backend_name, recipe) -> None:
    """To the last bit, and beside it there is the unused classifier only."""
    spec = config.load(recipe, ["threads=1"])
    state = initial_state(spec)
    rng = np.random.default_rng(0)
    for name, array in state.items():
        if name.startswith("teacher.encoder.") and not name.endswith("running_var"):
            state[name] = array + 0.1 * rng.standard_normal(array.shape).astype(array.dtype)
    images = rng.standard_normal((3, 1, *spec.model.size)).astype(np.float32)
    whole = open_engine(spec, backend_name, state)
    options = {"layers": (0, 1), "tokens": "all"}
    outputs = []
    for branch in ("student", "teacher"):
        alone = open_encoder(spec, backend_name, state, branch)
        kept = {name.split(".")[1] for name in alone.model_slots()}
        assert kept == {"encoder", "classifier"}
        assert not [name for name in alone.slots() if name.startswith(("teacher.", "memory."))]
        moments = sum(slot.read().size for slot in alone.moment_slots().values())
        assert moments <= 2 * (2 * spec.model.features + 2)
        expected = whole.embed(images, branch=branch, **options)
        outputs.append(alone.embed(images, **options))
        for name, array in expected.items():
            np.testing.assert_array_equal(outputs[-1][name], array, strict=True)
        alone.close()
    assert all((outputs[0][name] != outputs[1][name]).any() for name in outputs[0])
    whole.close()


def test_a_branch_that_is_not_there_is_named(backend, backend_name, tmp_path) -> None:
    spec = config.load(classifier_file(tmp_path, name="linear"))
    with pytest.raises(UserError, match=r"evaluate\.branch: teacher: method linear has none"):
        open_encoder(spec, backend_name, initial_state(spec), "teacher")


def test_layers_are_encoded_beside_the_final_features(encoder: Encoder) -> None:
    pixels = digits(3)
    outputs = encoder.encode_layers(pixels, (0,), tokens="all", batch_size=2)
    assert {name: x.shape for name, x in outputs.items()} == {
        "final": (3, 17, 8),
        "layer0": (3, 17, 8),
    }
    final = encoder.encode(pixels, tokens="all", batch_size=2)
    np.testing.assert_array_equal(outputs["final"], final)
    assert np.abs(outputs["layer0"] - final).max() > 0.01
    with pytest.raises(UserError, match="encode: layer 1: the encoder has layers 0 to 0"):
        encoder.encode_layers(pixels, (0, 1))


def classifier_file(folder: Path, **method: object) -> Path:
    """A spec of a supervised method on a small ViT and the digits."""
    spec = config.load("moco_v3/digits", SMALL).model_dump(mode="json")
    spec["method"] = {"classes": 10, **method}
    del spec["augment"]["view2"]
    path = folder / "classifier.yaml"
    path.write_text(json.dumps(spec))
    return path


def test_a_classifier_predicts_classes_by_name(backend, backend_name, tmp_path) -> None:
    path = classifier_file(tmp_path, name="finetune", momentum=0.99, pooling="cls")
    state = initial_state(config.load(path))
    rng = np.random.default_rng(3)
    for branch in ("student", "teacher"):
        weight = state[f"{branch}.classifier.weight"]
        state[f"{branch}.classifier.weight"] = rng.standard_normal(weight.shape)
    np.savez(tmp_path / "w.npz", **state)
    model = core.get_model(path, backend_name, tmp_path / "w.npz")
    pixels = digits(6)
    for branch in ("student", "teacher"):
        weight, bias = (state[f"{branch}.classifier.{kind}"] for kind in ("weight", "bias"))
        logits = model.encode(pixels, branch=branch) @ weight.T + bias
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        predictions = model.predict(pixels, top=3, branch=branch, batch_size=4)
        for found, expected in zip(predictions, scores, strict=True):
            best = np.argsort(-expected)[:3]
            assert found.labels == tuple(best)
            np.testing.assert_allclose(found.scores, expected[best], rtol=1e-9)
            assert found.names == tuple(str(label) for label in best)
    one = core.inference_model(model, pixels[2])
    (first,) = model.predict(pixels[2:3], top=20)
    student, teacher = (
        model.predict(pixels[2:3], top=20, branch=branch) for branch in ("student", "teacher")
    )
    assert [first] == teacher != student, "the mean of the weights, as an evaluation is judged"
    assert len(first.labels) == 10 and sum(first.scores) == pytest.approx(1)
    assert (one["pred_label"], one["pred_score"], one["pred_class"]) == (
        *(first.labels[0], first.scores[0]),
        first.names[0],
    )


def test_names_of_classes_are_those_of_the_data_or_numbers(tmp_path) -> None:
    path = classifier_file(tmp_path, name="linear")
    fashion = [*SMALL, "data.class_names=fashion_mnist"]
    absent = [*SMALL, "data.name=cifar10", f"data.root={tmp_path}", "model.channels=3"]
    absent += ["data.channels=3"]
    for overrides, names in (
        (SMALL, tuple("0123456789")),
        (fashion, TABLES["fashion_mnist"]),
        (absent, tuple("0123456789")),
    ):
        kept = [change for change in overrides if "method." not in change]
        assert core.get_model(path, "numpy", overrides=kept).classes == names


def test_one_of_several_classifiers_is_named_by_its_place(backend, backend_name, tmp_path) -> None:
    path = classifier_file(tmp_path, name="linear", rates=[0.1, 1.0])
    model = core.get_model(path, backend_name)
    pixels = digits(2)
    two = [model.predict(pixels, head=head) for head in (0, np.int64(1))]
    assert two[0] != two[1]
    alone = core.inference_model(model, pixels[1], head=1)
    assert (alone["pred_label"], alone["pred_class"]) == (two[1][1].labels[0], two[1][1].names[0])
    for head in (None, 2, 1.5, "rate 0.1"):
        said = f"predict: head {head}: the recipe has 2 classifiers; give one of 0 to 1"
        with pytest.raises(UserError, match=said):
            model.predict(pixels, head=head)
    with pytest.raises(UserError, match="branch teacher: the recipe has no mean of weights"):
        model.predict(pixels, head=0, branch="teacher")


def test_a_pretraining_recipe_predicts_nothing(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="predict: method moco_v3 trains no classifier"):
        encoder.predict(digits(1))


def test_weights_of_a_run_are_loaded(backend, backend_name: str, tmp_path: Path) -> None:
    spec = config.load("moco_v3/digits", [*SMALL, "seed=5"])
    state = {**initial_state(spec), "optimizer.step": np.array(1)}
    checkpoint.write(tmp_path, 1, state, spec, {}, keep=1)
    pixels = digits(2)
    loaded, same_seed, other_seed = (
        core.get_model("moco_v3/digits", backend_name, w, overrides=[*SMALL, f"seed={s}"])
        for w, s in ((tmp_path, 0), (None, 5), (None, 0))
    )
    assert np.array_equal(loaded.encode(pixels), same_seed.encode(pixels))
    assert not np.allclose(loaded.encode(pixels), other_seed.encode(pixels))


def test_what_does_not_fit_is_one_clear_line(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    for images, message in (
        ([], "no images"),
        (None, "encode: NoneType: give an array, or Pillow images or paths in a list"),
        (np.full((2, 1, 16, 16), np.nan), "floating images with values that are not finite"),
        (np.zeros((0, 8, 8), np.uint8), "no images"),
        (
            np.zeros((2, 1, 8, 8)),
            r"floating images of shape \(2, 1, 8, 8\), expected \(N, 1, 16, ",
        ),
        (np.zeros((2, 3, 8, 8), np.uint8), r"uint8 images of shape \(2, 3, 8, 8\), expected uint8"),
        (np.zeros((8, 8), np.uint8), r"expected uint8 \(N, H, W\)"),
        (np.zeros((2, 8, 8), np.int64), "int64 images"),
        ([tmp_path / "text.jpg"], "text.jpg: not an image"),
        (["none.png"], "none.png"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            encoder.encode(images)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.new("F", (4, 4)), "encode: images\\[0\\]: 32-bit pixels of mode F"),
        (Image.new("RGB", (0, 5)), "encode: images\\[0\\]: no pixels"),
        (None, "encode: images\\[0\\]: no pixels"),
        (b"x.jpg", "encode: images\\[0\\]: no pixels"),
    ],
)
def test_what_is_no_image_is_named_by_its_place(encoder: Encoder, image: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        encoder.encode([image])  # type: ignore[list-item]


def test_a_warning_names_the_file(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.new("RGB", (8, 8)).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with pytest.warns(UserWarning, match=f"{path}: Corrupt EXIF"):
        encoder.encode([path])


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'moco_v3/vit_small'"):
        core.get_model("moco_v3/vit_smal")
    with pytest.raises(UserError, match="backend 'jax': expected one of"):
        core.get_model("moco_v3/digits", "jax")
