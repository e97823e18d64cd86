"""Batches are pure functions of the seed and the step, whatever loads them."""

import hashlib
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.data_specs import VIEW, Huge, folder_spec, make_spec, write_images

from triptych.core.config.spec import AugmentSpec, RunSpec
from triptych.core.contracts import Batch
from triptych.core.data import Pipeline, evaluation_batches, open_evaluation, open_train
from triptych.core.errors import UserError
from triptych.core.random import stream
from triptych.core.reference import ops

NAMES = [f"{number:02}.{kind}" for number, kind in enumerate(["jpg", "png", "bmp"] * 4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path, NAMES)
    return tmp_path


def batches(spec: RunSpec, start: int, stop: int) -> list[Batch]:
    with Pipeline(spec, open_train(spec)) as pipeline:
        return list(pipeline.batches(start, stop))


def digest(loaded: list[Batch]) -> str:
    """Of every bit and the shapes."""
    found = hashlib.sha256()
    for batch in loaded:
        for array in (*batch.views, batch.index):
            found.update(f"{array.dtype}{array.shape}".encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def with_data(spec: RunSpec, **data: object) -> RunSpec:
    return spec.model_copy(update={"data": spec.data.model_copy(update=data)})


# ------------------------------------------------------------------------------------------ purity


def test_a_batch_of_digits_is_the_one_it_has_always_been():
    spec = make_spec(batch_size=32)
    assert digest(batches(spec, 44, 46)) == (
        "07a980ecc67d9b974c4aee1cd9c6c4810908182eeb2c579411d2c4213103c3d2"
    )


def test_the_digest_sees_every_change():
    spec = make_spec(batch_size=8)
    first = batches(spec, 0, 2)
    assert digest(first) == digest(batches(spec, 0, 2))
    other = batches(spec, 0, 2)
    other[1].views[1][3, 0, 5, 5] = np.nextafter(other[1].views[1][3, 0, 5, 5], np.float32(9))
    assert digest(other) != digest(first)
    assert digest(first[::-1]) != digest(first)
    assert digest(batches(make_spec(batch_size=8, seed=4), 0, 2)) != digest(first)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    spec = folder_spec(folder)
    expected = batches(spec, 1, 8)
    assert digest(batches(with_data(spec, workers=workers), 1, 8)) == digest(expected)


def test_more_workers_and_prefetch_than_batches_are_fine(folder):
    spec = with_data(folder_spec(folder), workers=3, prefetch=4)
    assert digest(batches(spec, 0, 2)) == digest(batches(folder_spec(folder), 0, 2))
    assert batches(spec, 2, 2) == []


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7])
def test_loading_begins_at_any_step(folder, start):
    spec = folder_spec(folder)
    assert digest(batches(spec, start, 9)) == digest(batches(spec, 0, 9)[start:])


def test_an_iterator_left_early_takes_no_step_with_it(folder):
    spec = folder_spec(folder)
    with Pipeline(spec, open_train(spec)) as pipeline:
        first = list(islice(pipeline.batches(0, 9), 4))
        rest = list(pipeline.batches(4, 9))
    assert digest(first + rest) == digest(batches(spec, 0, 9))


def test_the_batch_size_does_not_change_a_sample():
    """As when several ranks share a batch: a sample hangs on its place in the epoch alone."""
    whole = batches(make_spec(batch_size=12), 0, 2)
    parts = batches(make_spec(batch_size=4), 0, 6)
    for number in (0, 1):
        joined = np.concatenate([batch.views[number] for batch in parts])
        assert np.array_equal(np.concatenate([batch.views[number] for batch in whole]), joined)


def test_each_epoch_has_every_image_at_most_once_in_an_order_of_its_own(folder):
    spec = folder_spec(folder)
    assert Pipeline(spec, open_train(spec)).steps_per_epoch == 2  # 12 images, the last 2 dropped
    epochs = np.array([batch.index for batch in batches(spec, 0, 16)]).reshape(8, 10)
    for epoch in epochs:
        assert len(set(epoch)) == 10
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert set(epochs.ravel()) == set(range(12))


def test_views_differ_from_each_other_and_from_epoch_to_epoch(folder):
    loaded = batches(folder_spec(folder), 0, 12)
    seen = [view.tobytes() for batch in loaded for pair in batch.views for view in pair]
    assert len(set(seen)) == len(seen) == 12 * 2 * 5


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_and_oblong_images(folder, channels):
    spec = make_spec(
        {"name": "image_folder", "root": str(folder), "channels": channels}, size=(12, 24)
    )
    (batch,) = batches(spec, 0, 1)
    for view in batch.views:
        assert view.shape == (5, channels, 12, 24) and view.dtype == np.float32
        assert view.flags.c_contiguous and np.isfinite(view).all()
        if channels in (2, 4):  # these files have no alpha: it is opaque, 1 before normalisation
            assert np.allclose(view[:, -1], (1 - 0.4) / 0.3)
            assert view[:, 0].std() > 0.1
    assert batch.index.dtype == np.int64


def test_batches_stay_what_they_are_while_later_ones_load(folder):
    spec = with_data(folder_spec(folder), workers=1, prefetch=1)
    with Pipeline(spec, open_train(spec)) as pipeline:
        loading = pipeline.batches(0, 6)
        first = next(loading)
        before = digest([first])
        for _ in loading:
            pass
        assert digest([first]) == before
        assert pipeline.waited > 0


def test_a_batch_larger_than_the_data_is_refused(folder):
    spec = make_spec({"name": "image_folder", "root": str(folder)}, batch_size=13)
    with pytest.raises(UserError, match=r"train\.batch_size: 13 .* 12 images"):
        Pipeline(spec, open_train(spec))


# ---------------------------------------------------------------------------------------- damage


def cut_short(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])


DAMAGE = {
    "cut short": cut_short,
    "text": lambda path: path.write_text("this is no picture\n"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["03.jpg", "04.png"])
def test_a_damaged_file_is_named(folder, kind, name):
    spec = folder_spec(folder)
    source = open_train(spec)
    DAMAGE[kind](folder / name)
    with Pipeline(spec, source) as pipeline, pytest.raises(UserError) as caught:
        list(pipeline.batches(0, 4))
    message = str(caught.value)
    assert message.startswith(f"{folder / name}: ") and "data.on_error: skip" in message
    assert "\n" not in message


def test_the_error_of_a_worker_is_the_same(folder):
    cut_short(folder / "03.jpg")
    messages = set()
    for workers in (0, 2):
        with pytest.raises(UserError) as caught:
            batches(folder_spec(folder, workers=workers), 0, 4)
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.soak)])
def test_skipping_takes_the_next_image_of_the_order(folder, workers):
    spec = folder_spec(folder, on_error="skip", workers=workers)
    source, sound = open_train(spec), batches(spec, 0, 6)
    damaged = (3, 4, 7)
    for number in damaged:
        DAMAGE["text"](folder / NAMES[number])
    with Pipeline(spec, source) as pipeline:
        loaded = list(pipeline.batches(0, 6))
        assert sorted(pipeline.skipped) == [str(folder / NAMES[number]) for number in damaged]
    for step, (before, after) in enumerate(zip(sound, loaded, strict=True)):
        order = list(stream(spec.seed, "order", step // 2).permutation(len(NAMES)))
        for row, wanted in enumerate(before.index):
            after_it = order[order.index(wanted) :] + order
            assert after.index[row] == next(i for i in after_it if i not in damaged)
            for view, was in zip(after.views, before.views, strict=True):
                assert np.array_equal(view[row], was[row]) == (wanted not in damaged)
        # A stand-in does not look like the same image in its own place.
        assert len({row.tobytes() for view in after.views for row in view}) == 10


def test_skipping_everything_is_an_error(folder):
    spec = folder_spec(folder, on_error="skip")
    source = open_train(spec)
    for name in NAMES:
        cut_short(folder / name)
    with Pipeline(spec, source) as pipeline, pytest.raises(UserError, match="all 12 images"):
        next(pipeline.batches(0, 1))


# ------------------------------------------------------------------------------------- evaluation


def normal(raw: np.ndarray) -> np.ndarray:
    """As the spec of these tests normalises."""
    return (np.float32(raw) / np.float32(255) - np.float32(0.4)) / np.float32(0.3)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_sees_each_image_once_in_order(workers):
    spec = make_spec({"name": "digits", "channels": 1, "workers": workers}, size=8)
    _, queries = open_evaluation(spec) or pytest.fail("digits have a held-out split")
    loaded = list(evaluation_batches(spec, queries, 100))
    assert [len(labels) for _, labels in loaded] == [100, 100, 100, 60]
    images = np.concatenate([images for images, _ in loaded])
    labels = np.concatenate([labels for _, labels in loaded])
    assert images.dtype == np.float32 and images.shape == (360, 1, 8, 8)
    assert labels.tolist() == [queries.label(index) for index in range(360)]
    # At the size of the digits, resizing is the identity.
    raw = np.stack([np.asarray(queries.image(index)) for index in range(360)])
    assert np.array_equal(images[:, 0], normal(raw))


def test_evaluation_resizes_the_shorter_side_and_takes_the_middle(tmp_path):
    pixels = np.zeros((40, 80), np.uint8)
    pixels[:, 40:] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    spec = make_spec(
        {"name": "image_folder", "root": str(tmp_path), "channels": 1}, size=16, eval_resize=1.25
    )
    ((images, labels),) = evaluation_batches(spec, open_train(spec), 4)
    picture = Image.fromarray(pixels).resize((40, 20), Image.Resampling.BILINEAR)
    expected = np.asarray(picture)[2:18, 12:28]
    assert images.shape == (1, 1, 16, 16) and labels.tolist() == [-1]
    assert np.array_equal(images[0, 0], normal(expected))


def test_evaluation_of_oblong_images_leaves_nothing_empty(folder):
    spec = make_spec({"name": "image_folder", "root": str(folder)}, size=(32, 8))
    ((images, _),) = evaluation_batches(spec, open_train(spec), 12)
    assert images.shape == (12, 3, 32, 8)
    assert (images.std(axis=(2, 3)) > 0).all()


def test_evaluation_stops_at_a_damaged_file_or_leaves_it_out(folder):
    spec = folder_spec(folder)
    source = open_train(spec)
    cut_short(folder / NAMES[5])
    with pytest.raises(UserError, match=NAMES[5]):
        list(evaluation_batches(spec, source, 4))
    skipped: list[str] = []
    loaded = list(evaluation_batches(with_data(spec, on_error="skip"), source, 4, skipped))
    assert [len(images) for images, _ in loaded] == [4, 3, 4]
    assert skipped == [str(folder / NAMES[5])]


@pytest.mark.parametrize("workers", [0, 1])
def test_no_evaluation_batch_is_empty(folder, workers):
    """Some frameworks make NaN of no images, some end the process."""
    source = open_train(folder_spec(folder))
    for name in NAMES[4:8]:
        cut_short(folder / name)
    spec, skipped = folder_spec(folder, on_error="skip", workers=workers), list[str]()
    loaded = list(evaluation_batches(spec, source, 4, skipped))
    assert [len(labels) for _, labels in loaded] == [4, 4]
    assert skipped == [str(folder / name) for name in NAMES[4:8]]


def test_evaluation_of_nothing_readable_is_an_error(folder):
    spec = folder_spec(folder, on_error="skip")
    source = open_train(spec)
    for name in NAMES:
        cut_short(folder / name)
    with pytest.raises(UserError, match=f"all 12 images are damaged; the first is .*{NAMES[0]}"):
        list(evaluation_batches(spec, source, 5))


@pytest.mark.parametrize(("workers", "on_error"), [(0, "stop"), (0, "skip"), (1, "skip")])
def test_where_memory_ends_the_image_is_named(workers, on_error):
    """``skip`` too stops: what is trained on must not depend on the memory that is free."""
    spec = make_spec({"workers": workers, "on_error": on_error})
    with Pipeline(spec, Huge()) as pipeline, pytest.raises(UserError) as training:
        list(pipeline.batches(0, 2))
    with pytest.raises(UserError) as evaluating:
        list(evaluation_batches(spec, Huge(), 4))
    for caught in (training, evaluating):
        assert str(caught.value).startswith("huge[7]: not enough memory for this image; ")


# ------------------------------------------------------------------------------ bytes for a device


def as_bytes(spec: RunSpec, stop: int) -> list[Batch]:
    with Pipeline(spec, open_train(spec)) as pipeline:
        pipeline.as_bytes = True
        return list(pipeline.batches(0, stop))


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_normalised_by_a_device_are_the_same_batch(folder, channels):
    spec = folder_spec(folder, channels=channels)
    given, want = as_bytes(spec, 2), batches(spec, 0, 2)
    for batch, expected in zip(given, want, strict=True):
        assert all(view.dtype == np.uint8 for view in batch.views)
        views = tuple(ops.normalized(view, batch.levels) for view in batch.views)
        assert digest([replace(batch, views=views)]) == digest([expected])
        part = batch.part(slice(2, 4))
        np.testing.assert_array_equal(part.levels, batch.levels)
    # They stay what they are while later ones load.
    assert digest(given) == digest(as_bytes(spec, 2))


@pytest.mark.parametrize("values", ["pixels", "normalized"])
def test_noise_in_normalised_pixels_keeps_them_on_the_host(folder, values):
    spec = folder_spec(folder)
    recipe = [*VIEW[:1], {"op": "random_erase", "p": 1.0, "values": values}]
    augment = {**spec.augment.model_dump(), "view1": recipe, "view2": recipe}
    spec = spec.model_copy(update={"augment": AugmentSpec.model_validate(augment)})
    (batch,), (want,) = as_bytes(spec, 1), batches(spec, 0, 1)
    assert (batch.levels is None) == (values == "normalized")
    views = [v if batch.levels is None else ops.normalized(v, batch.levels) for v in batch.views]
    assert digest([replace(batch, views=tuple(views))]) == digest([want])
