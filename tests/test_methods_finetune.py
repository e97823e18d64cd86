"""Fine-tuning of every backend and of the reference against the original programs."""

import numpy as np
import pytest
from conftest import assert_close
from support.golden_eval import MOCA_VIT, case, encoder_state, normal_images
from support.golden_finetune import RUNS, deit, disagreements, fine_spec, head, moca
from support.marks import marked
from support.native import hyper

from triptych.core import reference
from triptych.core.contracts import Batch
from triptych.core.methods import finetune, networks

STEPS = {"readme_cosine": 1, "avg_no_fc_norm_plain_ce": 2, "accumulate_2": 2}
"""Runs that differ from others only at the start have fewer than their three steps."""


CASES = marked(RUNS, STEPS, pytest.mark.one_backend)


@pytest.mark.parametrize("run", CASES)
def test_fine_tuning_of_moca(backend, run):
    assert disagreements(backend, moca(run), steps=STEPS.get(run)) == []


def test_fine_tuning_of_deit(backend):
    """Eight steps with the weights' moving average, by which MoCo v3 is fine-tuned."""
    assert disagreements(backend, deit()) == []


@pytest.mark.parametrize("run", ["drop_path", "cls_token_clip"])
def test_the_reference_fine_tunes_too(run):
    assert disagreements(reference, moca(run), steps=1) == []


def test_the_reference_averages_weights_too():
    assert disagreements(reference, deit(), steps=2) == []


@pytest.mark.parametrize(
    ("name", "fc_norm"), [("avg_fc_norm_fresh", True), ("forward_features_avg_no_fc_norm", False)]
)
def test_mean_features_of_moca(backend, name, fc_norm):
    method = {"name": "finetune", "classes": 2, "pooling": "mean"}
    train = {"steps": 1, "batch_size": 4}
    spec = fine_spec({**MOCA_VIT, "fc_norm": fc_norm}, method, {}, train)
    state = encoder_state(spec, "encoder_teacher.") | head(2, spec.model.features)
    if fc_norm:
        own = "student.encoder.fc_norm."
        state |= {f"{own}weight": np.ones(96), f"{own}bias": np.zeros(96)}
    batch = Batch((normal_images(4100, 4, 64, 64),), np.arange(4), np.zeros(4, np.int64))
    values, _ = backend.build(spec, state).trace_step(batch, {}, hyper())
    assert_close(values["feature/feature"], case("features")[1][name], 1e-12)


# -------------------------------------------------------------------------- what must be noticed


def swapped(scales):
    """The factors of attention and MLP exchanged."""
    return scales.reshape(-1, 2, scales.shape[1])[:, ::-1].reshape(scales.shape)


def unscaled(scales):
    """A kept branch is not divided by its probability."""
    return (scales > 0).astype(np.float64)


def from_the_last(scales):
    """The blocks in reversed order."""
    return scales.reshape(-1, 2, scales.shape[1])[::-1].reshape(scales.shape)


@pytest.mark.one_backend
@pytest.mark.parametrize("change", [swapped, unscaled, from_the_last])
def test_wrong_factors_of_drop_path_are_noticed(backend, monkeypatch, change):
    honest = finetune.branch_scales
    monkeypatch.setattr(finetune, "branch_scales", lambda *given: change(honest(*given)))
    assert disagreements(backend, moca("drop_path"), steps=1)


@pytest.mark.one_backend
def test_a_missing_norm_after_pooling_is_noticed(backend):
    def remove(engine):
        engine.model.student.encoder.fc_norm.forward = lambda x: x

    wrong = disagreements(backend, moca("readme_warmup"), steps=1, change=remove)
    assert any(line.startswith("loss") for line in wrong)


@pytest.mark.one_backend
def test_pooling_by_the_other_token_is_noticed(backend, monkeypatch):
    honest = networks.Branch.classified
    monkeypatch.setattr(
        networks.Branch,
        "classified",
        lambda self, images, pooling, *scales: honest(
            self, images, {"cls": "mean", "mean": "cls"}[pooling], *scales
        ),
    )
    assert disagreements(backend, moca("cls_token_clip"), steps=1)


@pytest.mark.one_backend
@pytest.mark.parametrize("late", [0, 2])
def test_an_average_of_other_weights_is_noticed(backend, monkeypatch, late):
    """An average that is updated never, or twice."""

    def finish(model, outcome, hyper):
        for _ in range(late):
            model.update_teacher(hyper.ema)

    monkeypatch.setattr(finetune, "finish", finish)
    assert any(line.startswith("ema") for line in disagreements(backend, deit(), steps=2))


@pytest.mark.one_backend
def test_unmixed_targets_are_noticed(backend, monkeypatch):
    honest = finetune.prepare
    monkeypatch.setattr(finetune, "prepare", lambda batch, draws, spec: honest(batch, {}, spec))
    wrong = disagreements(backend, moca("readme_warmup"), steps=1)
    assert {line.partition("/")[0] for line in wrong} >= {"mixed", "targets", "loss"}
