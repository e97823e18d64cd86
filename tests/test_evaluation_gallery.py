"""Predictions, neighbours and maps behind a run's pictures, against computations by hand."""

import numpy as np
import pytest
from support.data_specs import write_images
from support.native import tiny_spec

from triptych.core import config
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import State
from triptych.core.data import evaluation_batches, labels_of, open_splits
from triptych.core.errors import NonFiniteError, UserError
from triptych.core.evaluation import gallery, maps
from triptych.core.evaluation.gallery import Gallery, Model, Predictions
from triptych.core.evaluation.scores import confusion
from triptych.core.launch import REFERENCE, open_encoder, open_engine
from triptych.core.parameters import initial_state

COMMON = ("precision=float64", "threads=1", "data.workers=0", "evaluate.k=[7, 3]")
TINY = (
    *COMMON,
    *("model.image_size=[8, 12]", "model.width=8", "model.depth=2", "model.heads=2"),
)
CLASSIFIERS = {
    "linear": ["method={name: linear, classes: 10, rates: [0.1, 1.0, 2.0]}"],
    "finetune": ["method={name: finetune, classes: 10, pooling: mean, momentum: 0.9}"],
}


def opened(
    overrides: list[str], recipe: str = "moco_v3/digits", tiny: tuple[str, ...] = TINY
) -> tuple[RunSpec, State, Model]:
    """A run of the recipe with lively weights, on the reference."""
    spec = config.load(recipe, [*tiny, *overrides])
    state = {
        name: x + np.random.default_rng(i).normal(0, 0.3, x.shape) if x.dtype.kind == "f" else x
        for i, (name, x) in enumerate(initial_state(spec).items())
    }
    if spec.method.labelled:
        return spec, state, Model(spec, open_engine(spec, REFERENCE, state), 5)
    engine = open_encoder(spec, REFERENCE, state, spec.evaluate.branch)
    return spec, state, Model(spec, engine, 5)


def images_of(spec: RunSpec, half: gallery.Half) -> np.ndarray:
    """The prepared images of a half, read in one piece."""
    batches = evaluation_batches(spec, half.source, 1000)
    return np.concatenate([batch[0] for batch in batches]).astype(np.float64)


def made(model: Model, count: int = 30) -> Gallery:
    return gallery.gather(model, gallery.draw(open_splits(model.spec), count))


def test_a_run_without_classifier_is_judged_by_its_neighbours() -> None:
    spec, state, model = opened(["evaluate.branch=teacher", "evaluate.tokens=mean"])
    done: list[int] = []
    images = gallery.draw(open_splits(spec), 30)
    shown = gallery.gather(model, images, done.append)
    assert done[-1] == 180 == sum(len(half.index) for half in (shown.queries, shown.bank))
    whole = open_engine(spec, REFERENCE, state)
    rows = []
    for half in (shown.queries, shown.bank):
        tokens = whole.embed(images_of(spec, half), branch="teacher", tokens="all")["final"]
        features = tokens[:, 1:].mean(1)
        np.testing.assert_allclose(half.features, features, rtol=1e-9)
        rows.append(features / np.linalg.norm(features, axis=1, keepdims=True))
    similarity = rows[0] @ rows[1].T
    predictions = shown.predictions
    assert predictions is not None and "k 7, temperature 0.07, 150 training" in predictions.by
    for i, row in enumerate(similarity):
        nearest = np.argsort(-row)[:7]
        found, index = shown.nearest(np.array([i]), 7)
        np.testing.assert_array_equal(index[0], nearest)
        np.testing.assert_allclose(found[0], row[nearest], atol=1e-9)
        votes = np.zeros(10)
        for near in nearest:
            votes[shown.bank.labels[near]] += np.exp(row[near] / 0.07)
        votes /= votes.sum()
        assert predictions.predicted[i] == votes.argmax()
        assert predictions.confidence[i] == pytest.approx(votes.max())
        assert predictions.own[i] == pytest.approx(votes[shown.queries.labels[i]])
    assert 0 < np.mean(predictions.predicted == shown.queries.labels) < 1


@pytest.mark.parametrize(("method", "branch"), [("linear", "student"), ("finetune", "teacher")])
def test_a_run_with_classifiers_is_judged_by_the_best_one(method: str, branch: str) -> None:
    spec, _, model = opened(CLASSIFIERS[method], f"moco_v3/digits_{method}")
    shown = made(model)
    assert model.branch == branch and model.tokens == ("mean" if method == "finetune" else "cls")
    logits = model.engine.classify(images_of(spec, shown.queries), branch=branch)
    labels = shown.queries.labels
    right = (logits.argmax(2) == labels).sum(1)
    best = np.flatnonzero(right == right.max())[-1]
    chances = np.exp(logits[best]) / np.exp(logits[best]).sum(1, keepdims=True)
    predictions = shown.predictions
    assert predictions is not None
    assert predictions.by == (
        "the classifier" if method == "finetune" else f"the best of 3 classifiers (no. {best})"
    )
    np.testing.assert_array_equal(predictions.predicted, logits[best].argmax(1))
    np.testing.assert_allclose(predictions.confidence, chances.max(1))
    np.testing.assert_allclose(predictions.own, chances[np.arange(30), labels])
    counts = np.zeros((10, 10), int)
    for label, said in zip(labels, predictions.predicted, strict=True):
        counts[label, said] += 1
    np.testing.assert_array_equal(shown.confusion, counts)


def test_images_are_drawn_and_no_image_is_in_both_halves(tmp_path) -> None:
    spec = config.load("moco_v3/digits", TINY)
    splits = open_splits(spec)
    first, second = (gallery.draw(splits, 20) for _ in range(2))
    assert first.held_out and (len(first.queries), len(first.bank)) == (20, 100)
    np.testing.assert_array_equal(first.queries.index, second.queries.index)
    assert not np.array_equal(first.queries.index, np.arange(20))
    assert len(np.unique(first.bank.index)) == 100
    write_images(tmp_path, [f"{kind}/{i}.png" for kind in "ab" for i in range(4)])
    alone = [*TINY, "data.name=image_folder", f"data.root={tmp_path}", "evaluate.every=0"]
    drawn = gallery.draw(open_splits(config.load("moco_v3/digits", alone)), 20)
    assert not drawn.held_out and (len(drawn.queries), len(drawn.bank)) == (4, 4)
    assert sorted([*drawn.queries.index, *drawn.bank.index]) == list(range(8))


def test_images_without_labels_have_no_predictions(tmp_path) -> None:
    write_images(tmp_path, [f"{i}.png" for i in range(8)])
    (tmp_path / "images.txt").write_text("".join(f"{i}.png\n" for i in range(8)))
    listed = [f"data.root={tmp_path}", f"data.list={tmp_path}/images.txt", "evaluate.every=0"]
    _, _, model = opened(["data.name=image_folder", *listed])
    shown = made(model)
    assert shown.predictions is None and shown.classes == () and not shown.held_out
    _, index = shown.nearest(np.array([0]), 99)
    assert sorted(index[0]) == list(range(4))


def test_labels_beyond_the_classes_and_infinite_features_are_one_line() -> None:
    linear = ["method={name: linear, classes: 4}"]
    _, _, model = opened(linear, "moco_v3/digits_linear")
    with pytest.raises(
        UserError, match=r"^method.classes: 4, but the images of data.name digits have 10"
    ):
        made(model)
    spec, state, _ = opened([])
    state["student.encoder.norm.bias"] = np.full(8, np.inf)
    broken = Model(spec, open_encoder(spec, REFERENCE, state, "student"), 5)
    with pytest.raises(NonFiniteError, match="not finite"):
        made(broken)


def test_worst_mistakes_spread_and_most_confused_classes() -> None:
    labels = np.array([0, 1, 2, 2, 1])
    predictions = Predictions(
        by="hand",
        predicted=np.array([1, 1, 0, 1, 0]),
        confidence=np.array([0.5, 0.9, 0.9, 0.6, 0.9]),
        own=np.array([0.4, 0.9, 0.0, 0.3, 0.0]),
    )
    assert gallery.worst(labels, predictions, 9).tolist() == [2, 4, 3, 0]
    assert gallery.worst(labels, predictions, 2).tolist() == [2, 4]
    assert gallery.spread(labels, 3).tolist() == [0, 4, 3]
    assert sorted(gallery.spread(labels, 9)) == list(range(5))
    counts = np.diag([9, 9, 9, 9])
    counts[3, 1], counts[0, 2], counts[2, 0] = 4, 3, 2
    assert gallery.most_confused(counts, 2).tolist() == [0, 2]
    assert gallery.most_confused(counts, 3).tolist() == [0, 1, 2]
    assert gallery.most_confused(counts, 9).tolist() == [0, 1, 2, 3]
    expected = [[0, 1, 0], [1, 1, 0], [1, 1, 0]]
    assert confusion(labels, predictions.predicted, 3).tolist() == expected


# -------------------------------------------------------------------------------------------- maps


def test_the_plane_holds_the_largest_share_of_the_variance() -> None:
    features = np.random.default_rng(0).normal(size=(20, 6)) * [5, 3, 1, 1, 1, 1]
    found = maps.plane(features)
    assert found is not None
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    left, strengths, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert found[1] == pytest.approx((strengths[:2] ** 2).sum() / (strengths**2).sum())
    np.testing.assert_allclose(np.abs(found[0]), np.abs(left[:, :2] * strengths[:2]), atol=1e-9)
    assert maps.plane(np.ones((20, 6))) is None and maps.plane(features[:4]) is None


def test_neighbourhoods_keep_clusters_apart() -> None:
    centres = np.repeat([[9.0, 0, 0], [0, 9.0, 0]], 8, axis=0)
    points = maps.neighbourhoods(centres + np.random.default_rng(0).normal(size=(16, 3)))
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    assert max(distance[:8, :8].max(), distance[8:, 8:].max()) < distance[:8, 8:].min()


def test_patches_with_equal_tokens_have_equal_colours_in_all_images() -> None:
    kinds = np.random.default_rng(0).normal(size=(4, 5))
    pattern = np.array([[0, 1, 2, 3, 0, 0], [3, 3, 2, 1, 1, 0]])
    colours = maps.patch_colours(kinds[pattern])
    assert colours.shape == (2, 6, 3) and colours.dtype == np.uint8
    of_kind = [np.unique(colours[pattern == kind], axis=0) for kind in range(4)]
    assert all(len(rows) == 1 for rows in of_kind)
    assert len(np.unique(np.concatenate(of_kind), axis=0)) == 4
    assert (maps.patch_colours(np.ones((2, 6, 5))) == 128).all()
    # Fewer dimensions than colours: the others stay grey.
    assert (maps.patch_colours(kinds[pattern][..., :2])[..., 2] == 128).all()


@pytest.mark.parametrize(
    ("case", "size"),
    [
        ("moco_v3_vit", [8, 12]),
        ("moco_v1_resnet18", [20, 41]),
        ("moco_v3_resnet18", [50, 97]),
    ],
)
def test_the_grid_is_that_of_the_tokens(case: str, size: list[int]) -> None:
    spec = tiny_spec(case=case, model={"image_size": size})
    engine = open_encoder(spec, REFERENCE, initial_state(spec), "student")
    images = np.random.default_rng(0).normal(size=(1, spec.model.channels, *spec.model.size))
    rows, columns = maps.grid(spec.model)
    assert rows != columns
    assert engine.embed(images, tokens="all")["final"].shape[1] == 1 + rows * columns
    # The order of the positions: what changes on the right reaches the last column alone.
    changed = images.copy()
    changed[..., -1] += 9.0
    moved = np.abs(
        engine.embed(changed, tokens="all", layers=(0,))["final"]
        - engine.embed(images, tokens="all", layers=(0,))["final"]
    )[0, 1:].sum(-1)
    assert moved.reshape(rows, columns)[:, -1].min() > 0


def test_labels_are_those_of_the_images() -> None:
    _, _, model = opened([])
    shown = made(model)
    for half in (shown.queries, shown.bank):
        np.testing.assert_array_equal(half.labels, labels_of(half.source, half.index))
        assert half.names(np.array([2])) == [half.source.key(2)]
    assert shown.classes == tuple("0123456789")
