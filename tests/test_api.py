"""The Python interface: names, weights, and images in every form a user has them."""

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
from triptych.core.errors import UserError
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
    assert core.list_models("*vit-small*") == ["mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k"]
    assert core.list_models("none*") == []
    with pytest.raises(AttributeError, match="no_such_thing"):
        core.no_such_thing  # noqa: B018


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_a_recipe_of_that_size(alias: str) -> None:
    spec = config.load(ALIASES[alias])
    if "_pt_in1k" not in alias:  # PaddleFleetX names neither
        assert spec.model.name.removeprefix("vit_") in alias
        assert f"-{spec.train.epochs}e_" in alias
    assert spec.method.name.replace("_", "") in alias.replace("_", "")
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
    expected = encoder.engine.embed(batch)["final"]
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
