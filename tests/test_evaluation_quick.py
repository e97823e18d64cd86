"""Quick protocols while training: linear probe on cached features, effective rank, one pass."""

import json

import numpy as np
import pytest
from scipy.linalg import eigh
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from support.data_specs import make_spec, write_images
from support.double import finished, install, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from triptych.core import reference
from triptych.core.config.evaluate import EvaluateSpec, ProbeSpec
from triptych.core.data import augmented_views, open_splits
from triptych.core.errors import UserError
from triptych.core.evaluation import PROTOCOLS, probe, rank
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.subject import Choice, Subject, raw_pixels
from triptych.core.report import page, table
from triptych.core.runs.log import read_rows
from triptych.core.runs.record import read_run

# ------------------------------------------------------------------------------- effective rank


def test_the_effective_rank_counts_the_even_directions_of_a_spectrum():
    assert rank.effective_rank(np.array([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3, abs=1e-5)
    # By hand: p = 3/4, 1/4.
    assert rank.effective_rank(np.array([3.0, 1.0])) == pytest.approx(4 / 3**0.75, abs=1e-5)
    assert rank.effective_rank(np.zeros(4)) == 1.0


def test_rankme_is_the_entropy_of_singular_values():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((50, 6)))[0]
    turned = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    features = axes * [4.0, 4.0, 2.0, 0.0, 0.0, 0.0] @ turned
    share = np.array([0.4, 0.4, 0.2])
    assert rank.rankme(features) == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=1e-4)
    assert rank.rankme(np.ones((50, 6))) == pytest.approx(1, abs=1e-4)


def test_lidar_is_the_entropy_of_a_discriminant_analysis():
    rng = np.random.default_rng(1)
    means = rng.standard_normal((40, 1, 5)) * [5.0, 5.0, 1.0, 0.2, 0.0]
    features = means + rng.standard_normal((40, 3, 5)) * [1.0, 5.0, 0.1, 0.1, 0.0]
    centres = features.mean(axis=1)
    between = (centres - centres.mean(axis=0)).T @ (centres - centres.mean(axis=0)) / 40
    rest = (features - centres[:, None]).reshape(-1, 5)
    values = eigh(between, rest.T @ rest / 120 + 1e-4 * np.eye(5), eigvals_only=True)
    share = np.maximum(values, 0) / values.sum() + 1e-7
    assert rank.lidar(features) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
    # A direction in which the views of an image differ counts for less.
    noisy = features + rng.standard_normal((40, 3, 5)) * [0.0, 0.0, 9.0, 0.0, 0.0]
    assert rank.lidar(noisy) != pytest.approx(rank.lidar(features), rel=0.01)


# --------------------------------------------------------------------------------- linear probe


def clusters(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 240)
    features = rng.standard_normal((240, 7)) * np.arange(1, 8) + 2 * np.eye(7)[labels]
    return features[:160], labels[:160], features[160:], labels[160:]


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("standardize", [True, False])
def test_the_probe_equals_scikit_learn_called_by_hand(classes, standardize):
    bank, labels, queries, _ = clusters(classes)
    settings = ProbeSpec(penalty=0.01, standardize=standardize)
    scores, iterations = probe.classify(bank, labels, queries, settings)
    other = LogisticRegression(C=1 / (0.01 * 160), tol=1e-6, max_iter=200)
    pipeline = make_pipeline(StandardScaler(), other) if standardize else other
    pipeline.fit(bank, labels)
    np.testing.assert_array_equal(scores.argmax(axis=1), pipeline.predict(queries))
    assert iterations == other.n_iter_.max() > 1


def test_a_class_without_labelled_images_comes_last():
    bank, labels, queries, _ = clusters(4)
    scores, _ = probe.classify(bank, np.where(labels == 1, 0, labels), queries, ProbeSpec())
    assert scores.shape == (80, 4)
    assert (scores[:, 1] == -np.inf).all() and np.isfinite(scores[:, [0, 2, 3]]).all()


# ------------------------------------------------------------------------------- on one split

NAMES = [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(6)]


def split_of(tmp_path, *, workers=0, **settings):
    for half in ("train", "val"):
        write_images(tmp_path / half, NAMES)
    roots = {"root": str(tmp_path / "train"), "eval_root": str(tmp_path / "val")}
    spec = make_spec({"name": "image_folder", "on_error": "skip", "workers": workers, **roots})
    return Split(spec.model_copy(update={"evaluate": EvaluateSpec(k=4, per_class=(), **settings)}))


def test_inside_sharing_each_image_is_embedded_once(tmp_path):
    split, calls = split_of(tmp_path), []

    def embed(images):
        calls.append(len(images))
        return images.reshape(len(images), -1)[:, :20]

    subject = Subject(embed, 3, Choice("student", "cls"))
    with split.sharing():
        knn_row, probe_row = (PROTOCOLS[name].rows(split, subject)[0] for name in ("knn", "probe"))
        assert calls == [12, 12]
    assert knn_row.split == probe_row.split
    split.features(subject)
    assert calls == [12, 12, 12, 12], "outside, features are not kept"


def test_views_are_drawn_by_image_alone_and_damaged_images_are_left_out(tmp_path):
    split = split_of(tmp_path)
    spec, source = split.spec, open_splits(split.spec).train

    def views(index, spec=spec):
        return list(augmented_views(spec, source, np.array(index), 3, "lidar"))

    all_ = views(range(12))
    assert len(all_) == 12 and all_[0].shape == (3, 3, 16, 16)
    assert (all_[0][0] != all_[0][1]).any() and (all_[0][0] != all_[0][2]).any()
    np.testing.assert_array_equal(views([5, 2])[0], all_[5])
    two = spec.model_copy(update={"data": spec.data.model_copy(update={"workers": 2})})
    np.testing.assert_array_equal(views(range(12), two), all_)
    (tmp_path / "train" / NAMES[2]).write_text("broken")
    np.testing.assert_array_equal(views([1, 2, 3]), [all_[1], all_[3]])
    stop = spec.model_copy(update={"data": spec.data.model_copy(update={"on_error": "stop"})})
    with pytest.raises(UserError, match=r"cat/2\.png"):
        views([1, 2, 3], stop)


def test_rank_rows_hold_what_they_were_measured_on(tmp_path):
    split = split_of(tmp_path, rank={"images": 9, "view_images": 5, "views": 3})
    first, second = PROTOCOLS["rank"].rows(split, raw_pixels())
    assert (first.measure, first.images, first.views, first.width) == ("rankme", 9, 1, 768)
    assert (second.measure, second.images, second.views) == ("lidar", 5, 3)
    assert 1 < first.rank <= 9 and 1 < second.rank <= 5
    assert first.line().endswith("of 768 (RankMe, none raw pixels, 9 images)")
    assert "(LiDAR, none raw pixels, 5 images in 3 views)" in second.line()
    assert first.score is None, "no accuracy: health does not judge it"
    split = split_of(tmp_path, rank={"view_images": 0})
    (only,) = PROTOCOLS["rank"].rows(split, raw_pixels())
    assert only.images == 12


# --------------------------------------------------------------------------------- in a run

QUICK = (
    "evaluate={protocols: [knn, probe, rank], every: 6, per_class: [], probe: {iterations: 5}, "
    "rank: {images: 50, view_images: 4, views: 2}}"
)


def test_a_run_has_a_curve_for_each_protocol(tmp_path, monkeypatch):
    install(monkeypatch)
    embedded = []
    honest = reference.Engine.embed

    def embed(self, images, **options):
        embedded.append(len(images))
        return honest(self, images, **options)

    monkeypatch.setattr(reference.Engine, "embed", embed)
    keys = ("log.tensorboard=true", "log.every=3")
    folder = finished(tiny(QUICK, *keys), tmp_path / "run")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "eval" in row]
    assert [(row["step"], row["eval"]) for row in rows] == [
        (step, name) for step in (6, 12) for name in ("knn", "probe", "rank", "rank")
    ]
    (found,) = {row["trained_on"] for row in rows if row["eval"] == "probe"}
    assert found == "cached"
    images = rows[0]["bank"] + rows[0]["queries"]
    assert sum(embedded) == 2 * (images + 4 * 2), "one pass for all protocols, and the views"

    events = EventAccumulator(str(folder))
    events.Reload()
    for tag in ("knn/all/top1", "probe/top1", "rank/rankme/rank", "rank/lidar/rank"):
        assert [event.step for event in events.Scalars(tag)] == [6, 12], tag

    record = read_run(folder)
    text = page.render([record])
    for words in ("k-NN accuracy", "cached linear probe accuracy", "effective rank"):
        assert f">{words}<" in text
    assert "random initial weights" not in text  # nothing has evaluated them
    shown = table.table([record])
    headings = table.headings(shown)
    assert headings[4:7] == [
        "k-NN % trained",
        "cached linear probe % trained",
        "effective rank trained",
    ]
    assert table.caption(shown).endswith("effective rank on training images: RankMe / LiDAR")
    assert len(table.cells(shown[0], shown)) == len(headings)


def test_the_share_of_time_that_evaluations_took_is_logged(tmp_path, monkeypatch):
    install(monkeypatch)
    keys = ("evaluate.every=3", "log.every=3")
    folder = finished(tiny(*keys, "train.stop_at=9"), tmp_path)
    steps = [row for row in read_rows(folder / "metrics.jsonl") if "eval" not in row]
    shares = {row["step"]: row["evaluate_share"] for row in steps if "evaluate_share" in row}
    assert list(shares) == [6, 9], "of the time since the previous logged step"
    assert all(0 < share < 1 for share in shares.values())
    first = json.loads((folder / "result.json").read_text())
    whole = first["seconds"] + first["evaluate_seconds"]
    assert first["evaluate_share"] == pytest.approx(first["evaluate_seconds"] / whole)
    stamp = json.loads((folder / "checkpoints" / "step-00000009" / "manifest.json").read_text())
    before = stamp["extra"]["evaluate_seconds"]
    assert 0 < before < first["evaluate_seconds"]
    finished(tiny(*keys), tmp_path, resume="auto")
    second = json.loads((folder / "result.json").read_text())
    assert second["evaluate_seconds"] > before
