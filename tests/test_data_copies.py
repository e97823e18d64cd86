"""The batches of one copy of the model are its part of those of the run."""

from types import SimpleNamespace

import numpy as np
import pytest
from support.double import tiny

from triptych.core import config
from triptych.core.contracts import Group, evenly
from triptych.core.data import Pipeline, open_train
from triptych.core.data.jobs import Training
from triptych.core.errors import UserError
from triptych.core.methods import METHODS, finetune


def copy_of(rank, count):
    group = Group()
    group.rank, group.count = rank, count
    return group


def batches(spec, copy, start=0, stop=2):
    with Pipeline(spec, open_train(spec), copy) as pipeline:
        return list(pipeline.batches(start, stop))


def assert_part(part, whole, rows):
    assert (part.first, part.whole_size, part.rows) == (rows.start, len(whole.index), rows)
    np.testing.assert_array_equal(part.index, whole.index[rows])
    for view, every in zip(part.views, whole.views, strict=True):
        np.testing.assert_array_equal(view, every[rows])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.soak)])
def test_each_copy_loads_its_rows_and_no_others(workers):
    spec = tiny(f"data.workers={workers}")
    whole = batches(spec, Group())
    for rank in range(4):
        for part, batch in zip(batches(spec, copy_of(rank, 4)), whole, strict=True):
            assert_part(part, batch, slice(4 * rank, 4 * rank + 4))
    assert Training(spec, open_train(spec), 1, 4).shape[1] == 4


MIXING = {
    "reversed": ("mode=batch", "partner=reversed"),
    "permuted": ("mode=elem", "partner=permuted"),
}


def mixing_spec(kind, *more):
    keys = [f"method.mixing.{key}" for key in ("mixup=0.8", "cutmix=1.0", *MIXING[kind])]
    small = ["data.workers=0", "train.batch_size=10", "threads=1", "log.tensorboard=false"]
    return config.load("moco_v3/digits_finetune", [*small, *keys, *more])


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("count", [2, 3])
def test_images_are_mixed_with_those_of_other_copies(kind, count):
    spec = mixing_spec(kind, "train.drop_last=true")
    draws = METHODS["finetune"].draws(spec, 1)
    (whole,) = batches(spec, Group(), 1)
    mixed = finetune.prepare(whole, draws, spec.method)
    assert not np.array_equal(mixed.views[0], whole.views[0])
    for rank in range(count):
        (part,) = batches(spec, copy_of(rank, count), 1)
        rows = evenly(10, rank, count)
        assert part.partners is not None and len(part.partners.rows) <= len(part.index)
        assert_part(part, whole, rows)
        own = finetune.prepare(part, draws, spec.method)
        np.testing.assert_array_equal(own.views[0], mixed.views[0][rows])
        np.testing.assert_array_equal(own.targets, mixed.targets[rows])


def test_an_uneven_last_batch_is_divided_too():
    spec = mixing_spec("permuted", "train.drop_last=false")
    last = len(open_train(spec)) // 10
    (whole,) = batches(spec, Group(), last, last + 1)
    assert len(whole.index) == 7  # of 1437 images
    parts = [batches(spec, copy_of(rank, 4), last, last + 1)[0] for rank in range(4)]
    assert [len(part.index) for part in parts] == [2, 2, 2, 1]
    draws = METHODS["finetune"].draws(spec, last)
    mixed = finetune.prepare(whole, draws, spec.method)
    own = [finetune.prepare(part, draws, spec.method) for part in parts]
    np.testing.assert_array_equal(np.concatenate([p.views[0] for p in own]), mixed.views[0])


def test_a_last_batch_with_fewer_images_than_copies_is_refused():
    spec = mixing_spec("permuted", "train.drop_last=false", "train.batch_size=12")
    source = open_train(spec)  # 1437 = 119 * 12 + 9
    with pytest.raises(UserError, match="last batch of an epoch has 9 images, which"):
        Pipeline(spec, source, copy_of(0, 12))
    kept = SimpleNamespace(rank=0, count=9)
    Pipeline(spec, source, kept).close()
