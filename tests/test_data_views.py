"""What recipes ask of the pipeline besides two views: one view, copies, erasing, a last batch."""

from typing import Any

import numpy as np
import pytest
from support.data_specs import VIEW, folder_spec, make_spec, write_images

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Batch
from triptych.core.data import Pipeline, evaluation_batches, open_train, pixels

ERASE = {"op": "random_erase", "p": 1.0}


def changed(spec: RunSpec, **sections: dict[str, Any]) -> RunSpec:
    """The spec with other keys; a section ``method`` is replaced."""
    keys = spec.model_dump(mode="json")
    if "method" in sections:
        keys["method"] = {}
        keys["augment"]["view2"] = []
    for section, values in sections.items():
        keys[section] |= values
    return RunSpec.model_validate(keys)


def batches(spec: RunSpec, start: int, stop: int) -> list[Batch]:
    with Pipeline(spec, open_train(spec)) as pipeline:
        return list(pipeline.batches(start, stop))


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, [f"{number:02}.png" for number in range(12)])
    return tmp_path


def test_a_method_with_one_view_gets_the_first_one():
    two = batches(make_spec(), 0, 1)[0]
    one = batches(changed(make_spec(), method={"name": "finetune", "classes": 10}), 0, 1)[0]
    assert len(one.views) == 1
    np.testing.assert_array_equal(one.views[0], two.views[0])
    assert one.labels is not None and two.labels is None


def test_erasing_replaces_boxes_of_the_same_view():
    plain = batches(make_spec(), 0, 2)
    erased = batches(changed(make_spec(), augment={"view1": [*VIEW, ERASE]}), 0, 2)
    boxes = []
    for before, after in zip(plain, erased, strict=True):
        np.testing.assert_array_equal(before.views[1], after.views[1])
        different = before.views[0] != after.views[0]
        assert 0 < different.mean() < 0.5
        assert different.any(axis=(1, 2, 3)).all()
        boxes += [tuple(map(tuple, np.argwhere(image[0])[[0, -1]])) for image in different]
    assert len(set(boxes)) > 5


@pytest.mark.parametrize("values", ["normalized", "pixels"])
def test_erasing_depends_on_no_worker_and_no_start(values):
    spec = changed(make_spec(), augment={"view1": [*VIEW, {**ERASE, "values": values}]})
    whole = batches(spec, 0, 4)
    others = batches(changed(spec, data={"workers": 2}), 0, 4)[1:] + batches(spec, 1, 4)
    for one, other in zip([*whole[1:], *whole[1:]], others, strict=True):
        np.testing.assert_array_equal(one.views, other.views)


def test_erasing_differs_from_epoch_to_epoch(folder):
    crop = {"op": "random_resized_crop", "p": 0.0}
    spec = changed(folder_spec(folder), augment={"view1": [crop, ERASE], "view2": [crop, ERASE]})
    loaded = batches(spec, 0, 4)
    assert spec.train.steps_per_epoch(12) == 2
    seen = {view.tobytes() for batch in loaded for pair in batch.views for view in pair}
    assert len(seen) == 2 * 4 * 5


def test_repeats_give_copies_with_draws_of_their_own(folder):
    spec = changed(folder_spec(folder), augment={"repeats": 3}, train={"batch_size": 6})
    with Pipeline(spec, open_train(spec)) as pipeline:
        assert pipeline.steps_per_epoch == 2
        loaded = list(pipeline.batches(0, 4))
    for epoch in (loaded[:2], loaded[2:]):
        index = np.concatenate([batch.index for batch in epoch]).reshape(4, 3)
        assert (index == index[:, :1]).all()
        assert len(set(index[:, 0])) == 4
    assert not np.array_equal(loaded[0].index, loaded[2].index)
    seen = {view.tobytes() for batch in loaded for pair in batch.views for view in pair}
    assert len(seen) == 4 * 2 * 6


def test_copies_may_fall_into_two_batches(folder):
    loaded = batches(changed(folder_spec(folder), augment={"repeats": 3}), 0, 2)
    index = np.concatenate([batch.index for batch in loaded])
    assert [len(set(part)) for part in (index[:3], index[3:6], index[6:9])] == [1, 1, 1]


def test_the_last_batch_of_an_epoch_may_be_smaller(folder):
    spec = changed(folder_spec(folder), train={"drop_last": False})
    loaded = batches(spec, 0, 6)
    assert [len(batch.index) for batch in loaded] == [5, 5, 2, 5, 5, 2]
    assert [batch.views[1].shape[0] for batch in loaded] == [5, 5, 2, 5, 5, 2]
    for epoch in (loaded[:3], loaded[3:]):
        assert sorted(np.concatenate([batch.index for batch in epoch])) == list(range(12))
    whole = batches(folder_spec(folder), 0, 2)
    np.testing.assert_array_equal(loaded[1].views, whole[1].views)


@pytest.mark.parametrize(
    ("keys", "make"),
    [
        (
            {"eval_resize": 1.5, "eval_interpolation": "bicubic"},
            lambda image: pixels.center_cover(image, (16, 16), 1.5, "bicubic"),
        ),
        (
            {"eval_resize": 1.5, "eval_rounding": "paddlefleetx"},
            lambda image: pixels.center_cover(image, (16, 16), 1.5, "bilinear", "paddlefleetx"),
        ),
        ({"eval_resize": None}, lambda image: pixels.center_crop(image, (16, 16))),
        (
            {"eval_resize": None, "eval_rounding": "paddlefleetx"},
            lambda image: pixels.center_crop(image, (16, 16), "paddlefleetx"),
        ),
    ],
)
def test_evaluation_prepares_pictures_as_the_spec_says(folder, keys, make):
    spec = changed(folder_spec(folder), augment=keys)
    source = open_train(spec)
    ((images, _),) = evaluation_batches(spec, source, 12)
    for number, image in enumerate(images):
        planes = np.empty((3, 16, 16), np.uint8)
        pixels.write_planes(make(source.image(number)), planes)
        np.testing.assert_array_equal(image, pixels.normalize(planes, [0.4], [0.3]))


def test_a_second_view_that_no_method_asks_for_is_an_error():
    keys = make_spec().model_dump(mode="json") | {"method": {"name": "finetune", "classes": 10}}
    with pytest.raises(ValueError, match="the method has one view"):
        RunSpec.model_validate(keys)
