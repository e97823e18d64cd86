"""The pictures of a MOCA run: masks, words and shares are those of the run."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from triptych.core import checkpoint, config, parameters, reference
from triptych.core.cli import main
from triptych.core.config.method import rounds
from triptych.core.methods import masking, moca
from triptych.core.report import moca_words
from triptych.core.training import run

SMALL = (
    "data.workers=0",
    "model.width=16",
    "model.depth=2",
    "model.heads=2",
    "model.image_size=[12, 16]",
    "model.patch_size=2",
    "method.words=24",
    "method.decoder_width=16",
    "method.decoder_heads=2",
    "method.early_layer=1",
    "train.batch_size=8",
    "train.steps=3",
    "optim.warmup_steps=1",
    "evaluate.every=0",
    "threads=1",
)


@pytest.fixture(scope="module")
def spec():
    return config.load("moca/digits", SMALL)


@pytest.fixture(scope="module")
def state(spec):
    return parameters.initial_state(spec)


def test_masks_are_those_of_the_last_update(spec, state):
    found = moca_words.examples(spec, state, step=3)
    draws = moca.draws(spec, 2)
    counts = rounds(6 * 8, spec.method.mask_ratios, spec.method.decoder_ratios)
    assert len(found) == moca_words.COUNT
    for i, example in enumerate(found):
        for number, (mask, one) in enumerate(zip(example.rounds, counts, strict=True), 1):
            order = draws[f"mask_ids_round{number}"][i]
            assert mask.shape == (6, 8)
            assert set(np.flatnonzero(mask == moca_words.VISIBLE)) == set(order[: one.visible])
            unseen = set(order[one.visible : one.decoded])
            assert set(np.flatnonzero(mask == moca_words.DECODED)) == unseen
    other = moca_words.examples(spec, state, step=2)
    assert any(np.any(a.rounds[0] != b.rounds[0]) for a, b in zip(found, other, strict=True))


def test_words_are_the_nearest_to_the_teachers_tokens(spec, state):
    engine = reference.build(spec, state)
    images = moca_words._images(spec)
    tokens = engine.embed(images, branch="teacher", tokens="all")["final"][:, 1:]
    cosine = tokens @ state["memory.words"].T / np.linalg.norm(tokens, axis=-1, keepdims=True)
    inner = masking.interior((6, 8), 1)
    weights = np.exp(20.0 * cosine)  # inverse_delta over the first distance, 10 / 0.5
    bags = (weights / weights.sum(-1, keepdims=True))[:, inner].mean(1)
    for i, example in enumerate(moca_words.examples(spec, state, step=1)):
        np.testing.assert_array_equal(example.words.ravel(), cosine[i].argmax(-1))
        words, shares = zip(*example.frequent, strict=True)
        assert list(words) == list(np.argsort(-bags[i])[: len(words)])
        np.testing.assert_allclose(shares, bags[i][list(words)], rtol=1e-9)


def test_the_image_is_shown_as_it_is(spec, state):
    example = moca_words.examples(spec, state, step=1)[0]
    assert example.pixels.shape == (12, 16, 3)
    assert example.pixels.min() < 20 and example.pixels.max() > 200  # ink and paper
    masked = moca_words._masked(example.pixels, np.full((12, 16), moca_words.VISIBLE))
    np.testing.assert_array_equal(masked, example.pixels)
    hidden = moca_words._masked(example.pixels, np.full((12, 16), moca_words.HIDDEN))
    assert len(np.unique(hidden)) == 1


def counts_of(spec):
    """The patches of the first round that the student sees, and that it predicts unseen."""
    one, _ = rounds(6 * 8, spec.method.mask_ratios, spec.method.decoder_ratios)
    return one.visible, one.decoded - one.visible


def test_a_report_of_a_trained_run_shows_them(backend, backend_name, spec, tmp_path, capsys):
    assert run.train(spec, backend_name, tmp_path / "run", say=lambda text: None) is None
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Masks and words of run" in page and "img-src data:" in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 4 * moca_words.COUNT
    sizes = {Image.open(io.BytesIO(base64.b64decode(text))).size for text in pictures}
    assert sizes == {(192, 144)}
    texts = re.findall(r'<img[^>]* alt="([^"]+)"', page)
    assert len(set(texts)) == 4 * moca_words.COUNT, "each picture has a text of its own"
    clear, faint = counts_of(spec)
    assert f"image 2, round 1: {clear} of 48 patches clear, {faint} faint" in texts
    assert "http:" not in page.replace("http://www.w3.org", "")


def test_without_a_checkpoint_there_is_a_line(spec, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (line,) = moca_words.section(spec, tmp_path)
    assert line.text.startswith("No whole checkpoint is there")


def test_without_the_images_the_rest_of_the_page_is_there(spec, state, tmp_path):
    checkpoint.write(tmp_path, 1, state, spec, {}, keep=1)
    assert len(moca_words.section(spec, tmp_path)) == 2
    lost = {"name": "image_folder", "root": "nowhere", "eval_root": "nowhere"}
    elsewhere = spec.model_copy(update={"data": spec.data.model_copy(update=lost)})
    (line,) = moca_words.section(elsewhere, tmp_path)
    assert line.text.startswith("There are no pictures: ") and "nowhere" in line.text
