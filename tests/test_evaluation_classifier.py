"""Top-1, top-5 and loss of classifiers, against the original programs and by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from support.data_specs import make_spec, write_images
from support.golden_weights import GOLDEN, normal

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE
from triptych.core.errors import NonFiniteError, UserError
from triptych.core.evaluation import classifier
from triptych.core.evaluation.scores import Scores, Tally
from triptych.core.evaluation.split import Split
from triptych.core.runs.rows import evaluation

SWEEP = {"name": "linear", "rates": [0.1, 1.0], "weight_decays": [0.0, 1e-4]}
NAMES = [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(3)]


def scores(logits: np.ndarray, labels: np.ndarray, batch: int = 4) -> Scores:
    tally = Tally()
    for start in range(0, len(labels), batch):
        tally.add(logits[:, start : start + batch], labels[start : start + batch])
    return tally.scores()


def golden(name: str) -> tuple[dict, dict]:
    with np.load(GOLDEN / "eval" / f"{name}.npz") as arrays:
        return json.loads((GOLDEN / "eval" / f"{name}.json").read_text()), dict(arrays)


# ------------------------------------------------------------------------- the original programs


@pytest.mark.parametrize("name", ["linear_moco_resnet18", "linear_moco_v3_vit"])
def test_validation_is_that_of_moco(name):
    settings, arrays = golden(name)
    weights = dict(zip(settings["head_weight_steps"], arrays["head_weight"], strict=True))
    epochs = [epoch for epoch in range(settings["config"]["epochs"]) if 3 * epoch + 3 in weights]
    assert len(epochs) >= 2
    for epoch in epochs:
        step = 3 * epoch + 3
        logits = arrays["val_features"] @ weights[step].T + arrays["head_bias"][step]
        found = scores(logits[None], arrays["val_labels"])
        assert found.loss[0] == pytest.approx(arrays["epoch/val_loss_avg"][epoch], rel=1e-12)
        for top, percent in ((found.top1, "acc1"), (found.top5, "acc5")):
            # The original counts in float32.
            wanted = arrays[f"epoch/val_{percent}_avg"][epoch]
            assert 100 * top[0] == pytest.approx(wanted, rel=1e-6), (epoch, percent)


def moca_heads(arrays, run, labels):
    """(weights, biases) of MOCA's 45 heads after each epoch: SGD with momentum 0.9."""
    features, rates = arrays[f"{run}/train_features"], arrays[f"{run}/lr"]
    shape = (rates.shape[1], 6, features.shape[1])
    weights = np.float32(
        [0.01 * normal(f"head{i}.linear.weight", shape[1:]) for i in range(shape[0])]
    ).astype(np.float64)
    state = [weights, np.zeros(shape[:2])]
    moments = [np.zeros_like(value) for value in state]
    for step in range(6):
        rows = arrays["order"][step // 2][8 * (step % 2) :][:8]
        logits = np.einsum("nd,hcd->hnc", features[rows], state[0]) + state[1][:, None]
        share = np.exp(logits - logits.max(axis=2, keepdims=True))
        share /= share.sum(axis=2, keepdims=True)
        error = (share - np.eye(6)[labels[rows]]) / len(rows)
        gradients = [np.einsum("hnc,nd->hcd", error, features[rows]), error.sum(axis=1)]
        for value, moment, gradient in zip(state, moments, gradients, strict=True):
            moment[:] = 0.9 * moment + gradient
            value -= rates[step].reshape(-1, *[1] * (value.ndim - 1)) * moment
        if step % 2:
            yield state


@pytest.mark.parametrize("run", ["avg", "cls", "both", "cls_last4", "both_last2"])
def test_validation_and_best_head_are_those_of_moca(run):
    settings, arrays = golden("linear_moca")
    highest = 0.0
    best = settings["runs"][run]["best_per_epoch"]
    heads = moca_heads(arrays, run, arrays["train_labels"])
    for epoch, (weights, biases) in enumerate(heads):
        logits = np.einsum("nd,hcd->hnc", arrays[f"{run}/val_features"], weights)
        logits, labels = logits + biases[:, None], arrays["val_labels"]
        found, wanted = scores(logits, labels), arrays[f"{run}/val"][epoch]
        # The original's loss is the mean over its batches, of which the last one is smaller.
        batches = [scores(logits[:, part], labels[part]) for part in (slice(8), slice(8, 15))]
        means = np.mean([batch.loss for batch in batches], axis=0)
        np.testing.assert_allclose(means, wanted[:, 2], rtol=1e-12)
        np.testing.assert_allclose(100 * found.top1, wanted[:, 0], rtol=1e-6)
        np.testing.assert_allclose(100 * found.top5, wanted[:, 1], rtol=1e-6)
        # The original's accuracies of equal heads may differ in the last bits.
        head = replace(found, top1=wanted[:, 0]).best
        if wanted[head, 0] > highest:  # across epochs the first one wins
            highest, rate = wanted[head, 0], settings["base_lr"][head]
        assert (highest, rate) == (best[epoch]["best_acc"], best[epoch]["best_lr"])
    assert epoch == 2


# ------------------------------------------------------------------------------------- by hand


def test_scores_do_not_depend_on_the_batches():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(3, 20, 7)), generator.integers(0, 7, 20)
    whole = scores(logits.astype(np.float32), labels, batch=20)
    ranks = np.argsort(-logits.astype(np.float32), axis=2)
    hits = ranks == labels[:, None]
    np.testing.assert_allclose(whole.top1, hits[:, :, 0].mean(axis=1))
    np.testing.assert_allclose(whole.top5, hits[:, :, :5].any(axis=2).mean(axis=1))
    for batch in (1, 6):
        parts = scores(logits.astype(np.float32), labels, batch)
        assert np.array_equal(parts.top1, whole.top1) and np.array_equal(parts.top5, whole.top5)
        assert np.array_equal(parts.predicted, whole.predicted)
        np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-14)


def test_equal_logits_predict_nothing():
    labels = np.array([0, 1, 5])
    found = scores(np.zeros((1, 3, 6), np.float32), labels)
    assert (found.top1[0], found.top5[0]) == (0.0, 0.0)
    assert found.loss[0] == pytest.approx(np.log(6))
    few = scores(np.zeros((1, 3, 3), np.float32), np.array([0, 1, 2]))
    assert (few.top1[0], few.top5[0]) == (0.0, 1.0), "fewer classes than five"


def test_large_logits_have_an_exact_loss():
    logits = np.array([[[1e5, 0.0], [0.0, 1e5]]], np.float32)
    assert scores(logits, np.array([1, 1])).loss[0] == pytest.approx(5e4, rel=1e-12)


def test_confusion_counts_labels_in_rows():
    labels = np.array([0, 0, 1, 2])
    logits = np.stack([np.eye(3)[[0, 2, 1, 1]], np.eye(3)[[0, 0, 1, 2]]])
    found = scores(logits, labels, batch=3)
    assert found.confusion(0, 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]
    assert found.confusion(1, 4).diagonal().tolist() == [2, 1, 1, 0]
    assert found.best == 1
    assert scores(np.stack([logits[1]] * 3), labels).best == 2, "of equal ones the last"


# ----------------------------------------------------------------------------- rows of a split


def labelled_spec(folder, **method) -> RunSpec:
    """Six labelled and six held-out images of two classes, and a classifier."""
    for half in ("train", "val"):
        write_images(folder / half, NAMES)
    roots = {"root": str(folder / "train"), "eval_root": str(folder / "val")}
    spec = make_spec({"name": "image_folder", "on_error": "skip", **roots})
    tree = {**spec.model_dump(exclude={"augment": {"view2"}}), "method": {"classes": 2, **method}}
    return RunSpec.model_validate(tree)


def engine_of(spec, logits):
    """An engine that has (branch, number of images) -> logits for the next images."""

    def classify(images, branch):
        assert images.shape[1:] == (3, 16, 16)
        return logits(branch, len(images))

    return SimpleNamespace(spec=spec, ranks=ALONE, classify=classify)


def test_the_best_classifier_of_a_sweep_is_named_with_its_rate(tmp_path):
    spec = labelled_spec(tmp_path, **SWEEP)
    hits = np.array([[1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1], [0] * 6])
    labels = np.array([0, 0, 0, 1, 1, 1])
    logits = np.eye(2)[np.where(hits == 1, labels, 1 - labels)]
    (row,) = classifier.rows(Split(spec), engine_of(spec, lambda branch, n: logits), 7)
    assert (row.eval, row.step, row.branch, row.main) == ("linear", 7, "student", True)
    assert (row.head, row.rate, row.weight_decay) == (2, 1.0, 0.0)
    assert (row.top1, row.top5, row.images) == (5 / 6, 1.0, 6)
    assert [head["top1"] for head in row.heads] == [4 / 6, 5 / 6, 5 / 6, 0.0]
    assert [(head["rate"], head["weight_decay"]) for head in row.heads] == [
        *[(0.1, 0.0), (0.1, 1e-4)],
        *[(1.0, 0.0), (1.0, 1e-4)],
    ]
    assert row.line() == (
        "step 7 linear probe top-1 83.33 % (top-5 100.00 %, loss 0.4799, best of 4 "
        "classifiers: head 2, rate 1, weight decay 0, on augmented features, 6 images)"
    )
    assert evaluation(json.loads(json.dumps(row.as_json()))) == row


def test_an_average_of_the_weights_has_the_main_row(tmp_path):
    spec = labelled_spec(tmp_path, name="finetune", momentum=0.9)
    (tmp_path / "val" / NAMES[0]).write_text("broken")
    right = np.eye(2)[None, [0, 0, 1, 1, 1]]

    def logits(branch, count):
        assert count == 5
        return right if branch == "teacher" else 1 - right

    split = Split(spec)
    teacher, student = classifier.rows(split, engine_of(spec, logits), 3)
    assert (teacher.branch, teacher.main, teacher.top1, teacher.tag) == (
        *("teacher", True, 1.0, "finetune"),
    )
    assert (student.branch, student.main, student.top1, student.tag) == (
        *("student", False, 0.0, "finetune/student"),
    )
    assert teacher.skipped == student.skipped == 1 and teacher.split == student.split != ""
    assert teacher.heads == [] and teacher.rate is None and teacher.trained_on is None
    assert teacher.line() == (
        "step 3 fine-tuning top-1 100.00 % (top-5 100.00 %, loss 0.3133, average of the weights, "
        "5 images, damaged files left out: 1)"
    )
    assert "without average" in student.line()
    assert split.damaged() == [str(tmp_path / "val" / NAMES[0])]


def test_logits_that_are_not_finite_end_the_evaluation(tmp_path):
    spec = labelled_spec(tmp_path, name="linear")
    engine = engine_of(spec, lambda branch, n: np.full((1, n, 2), np.nan))
    with pytest.raises(NonFiniteError, match="evaluation after step 5: logits not finite"):
        classifier.rows(Split(spec), engine, 5)


def test_an_evaluation_can_be_broken_off(tmp_path):
    spec = labelled_spec(tmp_path, name="linear")

    def check():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        classifier.rows(Split(spec), engine_of(spec, None), 5, check)


class Labels(list):
    """A source of nothing but labels."""

    def label(self, index):
        return self[index]


def test_held_out_labels_have_to_fit_the_classifier(tmp_path):
    spec = labelled_spec(tmp_path, name="linear")
    split = Split(spec)
    classifier.check(split)
    for label, line in (
        (2, "method.classes: 2, but a held-out image has label 2; labels begin at 0"),
        (-1, "evaluate: 3 of the 3 held-out images of data.name image_folder have no label"),
    ):
        split.queries = Labels([label] * 3)
        with pytest.raises(UserError) as caught:
            classifier.check(split)
        assert str(caught.value).startswith(line)
