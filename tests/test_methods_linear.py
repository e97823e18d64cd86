"""The linear probe of every backend and of the reference against the original programs."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
from conftest import assert_close
from support import golden_linear
from support.golden_eval import MOCA_VIT, case, encoder_state, normal_images, position_table
from support.golden_linear import (
    MOCA_FEATURES,
    MODELS,
    disagreements_moca,
    disagreements_single,
    moca,
    paddle_head,
    probe_spec,
    replay,
    single_head,
)
from support.golden_weights import probe
from support.marks import marked

from triptych.core import reference
from triptych.core.formats.positions import resample
from triptych.core.methods import models

HEADS = (0, 22, 36, 40, 44)
"""Rates of MOCA's sweep from 0.0001 to 9, among them the best ones."""
DECAYS = (0.0, 1e-6, 1e-5, 1e-4)
ONE_STEP = {"steps": 1, "batch_size": 4}


@pytest.mark.parametrize(
    "name",
    marked(MODELS, ("linear_moco_resnet50", "linear_moco_v3_resnet18"), pytest.mark.one_backend),
)
def test_probes_of_moco(backend, name):
    """That of a ResNet-50 has losses of 1e5: Paddle's own cross-entropy ends at 64 a sample."""
    task = single_head(name)
    assert disagreements_single(replay(backend, task), name, task) == []


@pytest.mark.parametrize("name", ["linear_moco_resnet50", "linear_moco_v3_vit"])
def test_the_reference_probes_too(name):
    task = single_head(name)
    assert disagreements_single(replay(reference, task), name, task) == []


@pytest.mark.parametrize("run", marked(MOCA_FEATURES, ("both", "cls"), pytest.mark.one_backend))
def test_sweeps_of_moca(backend, run):
    task = moca(run, HEADS)
    assert disagreements_moca(replay(backend, task), run, task, HEADS) == []


@pytest.mark.parametrize("run", ["cls_last4", "both_last2"])
def test_the_reference_sweeps_too(run):
    task = moca(run, HEADS)
    assert disagreements_moca(replay(reference, task), run, task, HEADS) == []


def test_all_rates_of_moca_at_once(backend):
    numbers = range(len(case("linear_moca")[0]["base_lr"]))
    task = moca("avg", numbers)
    found = replay(backend, task)
    assert disagreements_moca(found, "avg", task, numbers) == []
    golden = case("linear_moca")[1]
    weights, biases = found.heads[-1]
    assert_close(weights[22], golden["avg/last_weight_head22"], 1e-12)
    assert_close(biases, golden["avg/last_bias"], 1e-12)


def test_a_sweep_of_rates_and_decays(backend):
    task, heads = moca("avg", HEADS, DECAYS), golden_linear.official_heads(HEADS, DECAYS)
    found = replay(backend, task)
    golden = case("linear_moca")[1]
    losses = [found.rows[-1][f"loss_{i}"] for i in range(len(heads))]
    assert_close(losses, golden["avg_wd_grid/loss_last"][heads], 1e-12)
    probes = [probe(weight) for weight in found.heads[-1][0]]
    assert_close(probes, golden["avg_wd_grid/weight_probe_last"][heads], 1e-12)


def test_the_probe_of_paddlefleetx(backend):
    found, golden = replay(backend, paddle_head()), case("linear_paddle")[1]
    assert_close([row["loss"] for row in found.rows], golden["exact_loss"], 1e-12)
    weights = [weight[0] for weight, _ in found.heads]
    assert_close(weights, golden["exact_weight"], 1e-12)
    assert_close(weights, golden["weight"], 1e-7)  # Paddle's momentum is a float32
    assert_close([bias[0] for _, bias in found.heads], golden["bias"], 1e-7)
    assert_close(found.lr, golden["lr"], 1e-15)


FEATURES = {
    "knn_avg": {"pooling": "mean"},
    "knn_cls": {},
    "forward_features_cls": {},
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_moca(backend, name):
    golden, method = case("features")[1], {"classes": 2, **FEATURES[name]}
    spec = probe_spec(MOCA_VIT, method, {}, ONE_STEP)
    engine = backend.build(spec, initial(spec))
    images = normal_images(4100, 4, 64, 64)
    assert_close(images.sum(), golden["image_sum"][0], 1e-12)
    assert_close(engine.frozen_features(images), golden[name], 1e-12)


def test_features_of_the_last_blocks_of_moca(backend):
    golden = case("features")[1]
    method = {"classes": 2, "pooling": "both", "blocks": 6}
    spec = probe_spec(MOCA_VIT, method, {}, ONE_STEP)
    engine = backend.build(spec, initial(spec))
    found = engine.frozen_features(normal_images(4100, 4, 64, 64)).reshape(4, 7, 96)
    assert_close(found[:, :6], golden["intermediate_cls"], 1e-12)
    assert_close(found[:, 6], golden["intermediate_avg"][:, 5], 1e-12)


@pytest.mark.parametrize("size", [(64, 96), (40, 56), (128, 64)])
def test_features_of_other_sizes(backend, size):
    """timm resamples the table of positions for each image, in float32."""
    golden, name = case("features")[1], f"timm_dynamic_{size[0]}x{size[1]}"
    spec = probe_spec({**MOCA_VIT, "image_size": size}, {"classes": 2}, {}, ONE_STEP)
    table = position_table("encoder_teacher.")
    resampled = resample(table, (8, 8), spec.model.grid, "bicubic_antialias")
    engine = backend.build(spec, initial(spec) | {"student.encoder.pos_embed": resampled})
    images = normal_images(4110 + sum(size), 2, *size)
    tokens = engine.embed(images, tokens="all")["final"]
    assert_close(tokens[:, 0], golden[f"{name}_cls"], 1e-6)
    assert_close(tokens[:, 1:].mean(1), golden[f"{name}_avg"], 1e-6)
    assert_close([probe(one) for one in tokens], golden[f"{name}_tokens_probe"], 1e-6)


def test_tokens_of_moca(backend):
    golden = case("features")[1]
    spec = probe_spec(MOCA_VIT, {"classes": 2}, {}, ONE_STEP)
    engine = backend.build(spec, initial(spec))
    images = normal_images(4100, 4, 64, 64)
    found = engine.embed(images, tokens="all", layers=range(6))
    assert_close(found["final"][0], golden["tokens_image0"], 1e-12)
    norm = {n: engine.export_state()[f"student.encoder.norm.{n}"] for n in ("weight", "bias")}
    normed = [layer_norm(found[f"layer{i}"], **norm) for i in range(6)]
    for name, rows in (("cls", slice(0, 1)), ("avg", slice(1, None))):
        means = np.stack([tokens[:, rows].mean(1) for tokens in normed], axis=1)
        assert_close(means, golden[f"intermediate_{name}"], 1e-12)
    raw = found["layer5"][:, 1:].mean(1)
    assert_close(raw, golden["knn_avg_with_fc_norm_flag"], 1e-12)


def layer_norm(tokens, weight, bias):
    centered = tokens - tokens.mean(-1, keepdims=True)
    return centered / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6) * weight + bias


def initial(spec):
    """MOCA's teacher with a classifier of zeros."""
    state, shape = encoder_state(spec, "encoder_teacher."), (2, 96 * spec.method.blocks)
    if spec.method.pooling == "both":
        shape = (2, shape[1] + 96)
    head = {"weight": np.zeros(shape), "bias": np.zeros(2)}
    return state | {f"student.classifier.{name}": array for name, array in head.items()}


# -------------------------------------------------------------------------- what must be noticed


@pytest.mark.one_backend
def test_features_in_another_order_are_noticed(backend, backend_name, monkeypatch):
    pair = importlib.import_module(f"triptych.backends.{backend_name}.methods").Pair
    concat = pair.concat
    monkeypatch.setattr(pair, "concat", staticmethod(lambda parts: concat(parts[::-1])))
    task = moca("cls_last4", HEADS[:2])
    wrong = disagreements_moca(replay(backend, task, epochs=1), "cls_last4", task, HEADS[:2])
    assert any("features" in line for line in wrong)


@pytest.mark.one_backend
def test_heads_in_another_order_are_noticed(backend, monkeypatch):
    monkeypatch.setattr(
        models.Linear,
        "logits",
        lambda self, x: [getattr(self.student.classifier, str(i))(x) for i in (1, 0)],
    )
    task = moca("avg", HEADS[-2:])
    wrong = disagreements_moca(replay(backend, task, epochs=1), "avg", task, HEADS[-2:])
    assert any(line.startswith("loss") for line in wrong)


@pytest.mark.one_backend
def test_an_encoder_in_training_mode_is_noticed(backend, monkeypatch):
    """Its batch norms would normalise by the batch, and move."""

    def frozen(self, images):
        self.student.train()
        return self._features(images)

    monkeypatch.setattr(models.Linear, "frozen", frozen)
    name = "linear_moco_v3_resnet18"
    task = single_head(name)
    wrong = disagreements_single(replay(backend, task, epochs=1), name, task)
    assert any("features" in line for line in wrong)
    assert "the encoder moved" in wrong


@pytest.mark.one_backend
def test_a_classifier_with_another_rate_is_noticed(backend):
    task = moca("avg", HEADS[-2:])
    method = task.spec.method.model_copy(update={"rates": task.spec.method.rates[::-1]})
    swapped = replace(task, spec=task.spec.model_copy(update={"method": method}))
    wrong = disagreements_moca(replay(backend, swapped, epochs=1), "avg", task, HEADS[-2:])
    assert any(line.startswith("weight_norm") for line in wrong)
