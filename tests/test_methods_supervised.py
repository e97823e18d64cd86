"""Linear probe and fine-tuning: their batches, draws, tensors, and what the checks refuse."""

import math

import numpy as np
import pytest

from triptych.core import config
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Batch
from triptych.core.data import Pipeline, open_train
from triptych.core.errors import UserError
from triptych.core.methods import METHODS, finetune
from triptych.core.methods.health import Health
from triptych.core.parameters import table

LINEAR = {"name": "linear", "classes": 10}
FINETUNE = {"name": "finetune", "classes": 10}


def digits(method, **sections):
    """A run on the digits with labels."""
    given = {
        "data": {"name": "digits", "channels": 1},
        "augment": {"mean": [0.3], "std": [0.4]},
        "model": {
            "name": "vit",
            "width": 16,
            "depth": 3,
            "heads": 2,
            "patch_size": 4,
            "image_size": 8,
            "channels": 1,
        },
        "method": method,
        "optim": {"name": "sgd"},
        "train": {"steps": 4, "batch_size": 8},
    }
    for key, section in sections.items():
        given[key] = {**given.get(key, {}), **section}
    return RunSpec.model_validate(given)


def test_batches_have_one_view_and_the_labels_of_their_images():
    spec = digits(LINEAR)
    source = open_train(spec)
    with Pipeline(spec, source) as pipeline:
        batch = next(pipeline.batches(0, 1))
    assert [view.shape for view in batch.views] == [(8, 1, 8, 8)]
    assert batch.labels.tolist() == [source.label(int(i)) for i in batch.index]


def test_pretraining_gets_no_labels():
    spec = config.load("moco_v3/digits", ["data.workers=0"])
    with Pipeline(spec, open_train(spec)) as pipeline:
        batch = next(pipeline.batches(0, 1))
    assert (len(batch.views), batch.labels) == (2, None)


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (12, "one", "data: all 1437 training images are of one class, 7; a classifier needs two"),
        (12, None, "method.classes: 12, but the training images have 10 classes"),
        (10, {3: -1}, "method.name: linear learns from labels"),
        (10, "without 4", "data: class 4 has no training image"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(classes, labels, message):
    spec = digits({**LINEAR, "classes": classes})
    source = open_train(spec)
    if labels == "without 4":
        source.labels = np.where(source.labels == 4, 5, source.labels)
    elif labels == "one":
        source.labels, source.classes = np.zeros_like(source.labels), ("7",)
    elif labels:
        source.labels = source.labels.copy()
        source.labels[list(labels)] = list(labels.values())
    with pytest.raises(UserError, match=message) as caught:
        Pipeline(spec, source)
    assert "\n" not in str(caught.value)


def test_only_the_classifiers_of_a_probe_are_trained():
    params = table(digits({**LINEAR, "rates": [1.0, 0.5], "weight_decays": [0.0, 1e-4]}))
    trained = {p.name: p.shape for p in params if p.trainable}
    assert trained == {
        **{f"student.classifier.{i}.weight": (10, 16) for i in range(4)},
        **{f"student.classifier.{i}.bias": (10,) for i in range(4)},
    }
    assert not any(p.name.startswith("teacher.") for p in params)


def test_a_sweep_pairs_each_rate_with_each_decay_the_rate_outside():
    spec = digits({**LINEAR, "rates": [1.0, 0.5], "weight_decays": [0.0, 1e-4]})
    assert [tuple(p) for p in spec.method.probes] == [
        (1.0, 0.0),
        (1.0, 1e-4),
        (0.5, 0.0),
        (0.5, 1e-4),
    ]


@pytest.mark.parametrize(
    ("pooling", "blocks", "width"),
    [("cls", 1, 16), ("cls", 3, 48), ("mean", 1, 16), ("both", 2, 48)],
)
def test_the_width_of_the_features_of_a_probe(pooling, blocks, width):
    spec = digits({**LINEAR, "pooling": pooling, "blocks": blocks})
    shapes = {p.name: p.shape for p in table(spec)}
    assert shapes["student.classifier.weight"] == (10, width)


def test_fine_tuning_averages_encoder_and_classifier_only_if_asked():
    model = {"freeze_positions": False, "freeze_patch_embed": False, "fc_norm": True}
    method = {**FINETUNE, "pooling": "mean"}
    plain = table(digits(method, model=model))
    averaged = table(digits({**method, "momentum": 0.9}, model=model))
    assert all(p.trainable for p in plain)
    student = [p.name for p in plain]
    assert "student.encoder.fc_norm.weight" in student
    assert "student.encoder.norm.weight" not in student
    teacher = [p.name for p in averaged if p.name.startswith("teacher.")]
    assert [name.replace("teacher.", "student.") for name in teacher] == student


def test_drop_path_draws_name_each_branch_and_scale_what_is_kept():
    spec = digits({**FINETUNE, "drop_path": 0.5}, train={"batch_size": 2000})
    keep = METHODS["finetune"].draws(spec, 3)["drop_path_keep"]
    assert keep.shape == (4, 2000)  # two blocks after the first, attention and MLP
    assert keep.mean(1) == pytest.approx([0.75, 0.75, 0.5, 0.5], abs=0.05)
    scales = finetune.branch_scales(keep, 0.5)
    assert (scales[:2] == 1.0).all()
    assert set(scales[2]) == {0.0, 1 / 0.75}
    assert set(scales[5]) == {0.0, 2.0}
    with pytest.raises(ValueError, match="drop_path_keep"):
        finetune.check_draws(spec, {"drop_path_keep": keep * 2})


def test_targets_are_one_hot_in_float64_so_that_their_rows_sum_to_1():
    spec = digits(FINETUNE)
    batch = Batch((np.zeros((2, 1, 8, 8), np.float32),), np.arange(2), np.array([3, 0]))
    targets = finetune.prepare(batch, {}, spec.method).targets
    assert targets.dtype == np.float64
    assert targets.argmax(1).tolist() == [3, 0]
    assert targets.sum() == 2.0


def test_a_supervised_run_is_at_chance_or_learns_and_never_collapses():
    spec = digits(LINEAR)
    chance = METHODS["linear"].chance(spec)
    assert chance == pytest.approx(math.log(10))
    health = Health(chance, METHODS["linear"].FLAT)
    assert [health.observe(chance, 0.0) for _ in range(30)] == ["at chance"] * 30
    assert "views" not in (health.advice(0.5) or "")
    assert [health.observe(1.0, 0.0) for _ in range(10)][-1] == "learning"


@pytest.mark.parametrize(
    ("method", "model", "key"),
    [
        ({**LINEAR, "blocks": 4}, {}, "method.blocks"),
        ({**LINEAR, "pooling": "mean", "blocks": 2}, {}, "method.blocks"),
        (LINEAR, {"fc_norm": True}, "model.fc_norm"),
        ({**FINETUNE, "pooling": "cls"}, {"fc_norm": True}, "model.fc_norm"),
    ],
)
def test_contradictions_name_the_key(method, model, key):
    with pytest.raises(ValueError, match=key):
        digits(method, model=model)


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ({**LINEAR, "pooling": "both"}, "method.pooling"),
        ({**FINETUNE, "drop_path": 0.1}, "method.drop_path"),
    ],
)
def test_a_resnet_has_no_class_token_and_no_drop_path(method, key):
    spec = digits(LINEAR).model_dump()
    spec["model"] = {"name": "resnet18", "channels": 1, "stem": "small"}
    with pytest.raises(ValueError, match=key):
        RunSpec.model_validate({**spec, "method": method})


def test_an_epoch_counts_its_last_smaller_batch_if_it_is_kept():
    train = digits(LINEAR).train
    assert train.steps_per_epoch(20) == 2
    assert train.model_copy(update={"drop_last": False}).steps_per_epoch(20) == 3


def test_mixed_images_come_from_the_draws_of_the_step():
    mixing = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
    spec = digits({**FINETUNE, "mixing": mixing, "drop_path": 0.1})
    draws = METHODS["finetune"].draws(spec, 0)
    assert draws.keys() == {"mix_partner", "mix_share", "mix_box", "drop_path_keep"}
    images = np.random.default_rng(0).random((8, 1, 8, 8))
    batch = Batch((images,), np.arange(8), np.arange(8))
    prepared = finetune.prepare(batch, draws, spec.method)
    assert not np.array_equal(prepared.views[0], images)
    assert prepared.targets.sum(1) == pytest.approx(np.ones(8))
    finetune.check_draws(spec, draws)
    with pytest.raises(ValueError, match="mix_share"):
        finetune.check_draws(spec, {**draws, "mix_share": draws["mix_share"] + 1.5})


@pytest.mark.parametrize(
    ("train", "key"),
    [({"batch_size": 9}, "train.batch_size"), ({"drop_last": False}, "train.drop_last")],
)
def test_mixing_needs_whole_batches_of_pairs(train, key):
    with pytest.raises(ValueError, match=key):
        digits({**FINETUNE, "mixing": {"mixup": 0.8}}, train=train)
