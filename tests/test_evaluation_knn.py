"""k-NN: against a loop, scikit-learn and recorded numbers; rules for ties; several settings."""

import json
import math
from contextlib import closing
from itertools import product

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier
from support.data_specs import make_spec, write_images
from support.golden_weights import GOLDEN
from support.native import lively_state, tiny_spec

from triptych.core.config.evaluate import EvaluateSpec
from triptych.core.errors import UserError
from triptych.core.evaluation import PROTOCOLS, knn, neighbours
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.subject import on_host, product_of, raw_pixels


def loop(bank, labels, queries, k, temperature):
    """The definition, one query and one neighbour at a time."""
    predicted = []
    for query in queries:
        ranked = []
        for i, row in enumerate(bank):
            norms = math.sqrt((row**2).sum()) * math.sqrt((query**2).sum())
            similarity = sum(a * b for a, b in zip(row, query, strict=True)) / norms
            ranked.append((-round(similarity, neighbours.DECIMALS), i))
        votes = {}
        for negative, i in sorted(ranked)[:k]:
            votes[labels[i]] = votes.get(labels[i], 0.0) + math.exp(-negative / temperature)
        predicted.append(min(votes, key=lambda label: (-votes[label], label)))
    return np.array(predicted)


def scores(bank, labels, queries, *, k, temperature, count=None):
    similarity, index = neighbours.neighbours(bank, queries, k)
    return knn.votes(similarity, labels[index], temperature, count or int(labels.max()) + 1)


def classify(bank, labels, queries, **settings):
    return scores(bank, labels, queries, **settings).argmax(axis=1)


@pytest.fixture
def noisy():
    """Three overlapping classes, so that neighbours and votes disagree often."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, 90)
    features = rng.standard_normal((90, 4)) + 0.7 * np.eye(4)[labels]
    return features[:60], labels[:60], features[60:], labels[60:]


@pytest.mark.parametrize("k", [1, 5, 60])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_loop(noisy, k, temperature):
    bank, labels, queries, _ = noisy
    found = classify(bank, labels, queries, k=k, temperature=temperature)
    np.testing.assert_array_equal(found, loop(bank, labels, queries, k, temperature))


def test_the_parameters_matter(noisy):
    """The data above can tell one k, and one temperature, from another."""
    bank, labels, queries, _ = noisy
    one, all_, sharp = (
        classify(bank, labels, queries, k=k, temperature=t)
        for k, t in ((1, 1.0), (60, 1.0), (60, 0.02))
    )
    assert (one != all_).any()
    assert (sharp != all_).any()


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (10, 0.07), (25, 0.5)])
def test_equals_scikit_learn(noisy, k, temperature):
    bank, labels, queries, query_labels = noisy
    other = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(bank, labels)
    found = classify(bank, labels, queries, k=k, temperature=temperature)
    np.testing.assert_array_equal(found, other.predict(queries))
    similarity, index = neighbours.neighbours(bank, queries, k)
    top1, _ = knn.accuracy(similarity, labels[index], query_labels, temperature)
    assert top1 == other.score(queries, query_labels)
    assert 0.3 < top1 < 1.0


def test_equals_scikit_learn_on_euclidean_distances_of_unit_rows():
    """Thousands of images: the candidates come from float32 blocks."""
    bank, labels, queries = many()
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank, queries)]
    other = KNeighborsClassifier(
        20, algorithm="brute", weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07)
    ).fit(unit[0].astype(np.float64), labels)
    found = classify(bank, labels, queries, k=20, temperature=0.07)
    np.testing.assert_array_equal(found, other.predict(unit[1].astype(np.float64)))


def many():
    """10,000 images of three classes and 300 queries, some of them in the bank, some twice."""
    rng = np.random.default_rng(11)
    labels = rng.integers(0, 3, 10_000)
    bank = (rng.standard_normal((10_000, 24)) + np.eye(24)[labels]).astype(np.float32)
    bank[9000:9100] = bank[:100]
    bank[9100:9200] = 3 * bank[:100]
    queries = rng.standard_normal((300, 24)).astype(np.float32)
    queries[:150] = bank[:150]
    return bank, labels, queries


@pytest.mark.parametrize("k", [1, 20, 300, 2048])
def test_candidates_of_float32_miss_no_neighbour(monkeypatch, k):
    bank, _, queries = many()
    calls = []
    whole = neighbours._compare_all
    monkeypatch.setattr(neighbours, "_compare_all", lambda *a: calls.append(a) or whole(*a))
    similarity, index = neighbours.neighbours(bank, queries, k)
    assert not calls
    expected, place = whole(bank, queries, k, lambda: None)
    np.testing.assert_array_equal(index, place)
    np.testing.assert_allclose(similarity, expected, rtol=0, atol=2e-12)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_products_of_a_backend_give_the_same_neighbours(backend, monkeypatch, precision):
    bank, _, queries = many()
    spec = tiny_spec(precision)
    with closing(backend.build(spec, lively_state(spec))) as engine:
        products, product = [], product_of(engine)

        def watched(a, b):
            products.append(product(a, b))
            assert products[-1].dtype == np.float32
            return products[-1]

        found = neighbours.neighbours(bank, queries, 20, product=watched)
        tf32 = engine.spec.model_copy(update={"precision": "tf32"})
        monkeypatch.setattr(engine, "spec", tf32)
        assert product_of(engine) is on_host
    assert sum(p.size for p in products) == len(bank) * len(queries)
    for one, other in zip(found, neighbours.neighbours(bank, queries, 20), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_threshold_above_the_nearest_in_float32_would_miss_neighbours(monkeypatch):
    bank, _, queries = many()
    index = neighbours.neighbours(bank, queries, 20)[1]
    monkeypatch.setattr(neighbours, "_bound", lambda width: -1e-4)
    assert (neighbours.neighbours(bank, queries, 20)[1] != index).any()


def test_features_too_much_alike_for_float32_are_compared_in_float64():
    bank, _, queries = many()
    direction = np.eye(24)[23]
    bank, queries = (direction + 1e-6 * rows.astype(np.float64) for rows in (bank, queries))
    found = neighbours.neighbours(bank, queries[:20], 5)
    whole = neighbours._compare_all(bank, queries[:20], 5, lambda: None)
    np.testing.assert_array_equal(found[1], whole[1])
    # A few queries of that kind leave the others alone.
    mixed = np.vstack([queries[:3], 1e6 * (queries[3:20] - direction)])
    found = neighbours.neighbours(bank, mixed, 5)
    np.testing.assert_array_equal(found[1][:3], whole[1][:3])


@pytest.mark.parametrize(("queries_block", "bank_block"), [(1, 1), (7, 11), (30, 3)])
def test_blocks_do_not_matter(noisy, monkeypatch, queries_block, bank_block):
    bank, labels, queries, _ = noisy
    bank = np.vstack([bank, bank[::-1]])  # every neighbour is there twice
    labels = np.concatenate([labels, labels[::-1] ^ 1])
    whole = classify(bank, labels, queries, k=7, temperature=0.07)
    for width in (neighbours.GROUPS, 1):  # float64 throughout, and candidates of float32
        monkeypatch.setattr(neighbours, "QUERIES", queries_block)
        monkeypatch.setattr(neighbours, "BANK", bank_block if width > 1 else 64)
        monkeypatch.setattr(neighbours, "GROUPS", width)
        found = classify(bank, labels, queries, k=7, temperature=0.07)
        np.testing.assert_array_equal(found, whole)


def test_ties_go_to_the_front_of_the_bank_and_to_the_lower_class():
    bank = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    query = np.array([[5.0, 0.0]])
    # Equally near: the first in the bank are the neighbours.
    assert classify(bank, np.array([4, 2, 2, 0]), query, k=1, temperature=0.1) == [4]
    # Equally many votes: the lower class wins.
    assert classify(bank, np.array([4, 2, 3, 0]), query, k=3, temperature=0.1) == [2]
    assert classify(bank, np.array([4, 2, 2, 0]), query, k=3, temperature=0.1) == [2]


def test_rounding_decides_no_tie():
    """One image at 50 lengths: unit rows and products differ in the last bits only."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        row, query = rng.standard_normal((2, 1, 33))
        bank = row * rng.uniform(0.1, 10.0, (50, 1))
        labels = np.arange(50)[::-1].copy()
        assert classify(bank, labels, query, k=1, temperature=0.07) == [49]


def test_a_tiny_temperature_is_the_nearest_neighbour(noisy):
    bank, labels, queries, _ = noisy
    np.testing.assert_array_equal(
        classify(bank, labels, queries, k=20, temperature=1e-6),
        classify(bank, labels, queries, k=1, temperature=1.0),
    )


@pytest.mark.parametrize("k", [0, 61])
def test_k_beyond_the_bank_is_refused(noisy, k):
    bank, labels, queries, _ = noisy
    with pytest.raises(ValueError, match=f"expected 1 to 60.*got {k}"):
        classify(bank, labels, queries, k=k, temperature=0.07)


@pytest.mark.parametrize("large", [False, True])
def test_features_that_are_not_finite_are_refused(noisy, large):
    bank, labels, queries = many() if large else noisy[:3]
    with pytest.raises(ValueError, match="not finite"):
        classify(np.where(bank == bank[3], np.nan, bank), labels, queries, k=5, temperature=1.0)


def test_few_labels_takes_so_many_of_each_class_and_always_the_same():
    labels = np.random.default_rng(0).integers(0, 5, 200)
    chosen = knn.few_labels(labels, 10)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [10] * 5)
    np.testing.assert_array_equal(chosen, knn.few_labels(labels, 10))
    assert (np.diff(chosen) > 0).all()
    # Not simply the first ones, and a class that has fewer gives what it has.
    assert not np.array_equal(chosen, np.sort(np.argsort(labels, kind="stable")[:50]))
    assert len(knn.few_labels(np.array([0, 0, 0, 1]), 2)) == 3


# ------------------------------------------------------------------------- recorded numbers

RECORDED = np.load(GOLDEN / "eval" / "knn.npz")
SETTINGS = json.loads((GOLDEN / "eval" / "knn.json").read_text())


def recorded(prefix=""):
    names = ("train_features", "train_labels", "test_features", "test_labels")
    return [RECORDED[f"{prefix}{name}"] for name in names]


def first_classes(scores, most=5):
    """(Q, 5) classes by their votes, the lower one first among equal ones."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :most]


def test_one_search_gives_every_recorded_prediction():
    bank, labels, queries, query_labels = recorded()
    similarity, index = neighbours.neighbours(bank, queries, max(SETTINGS["k"]))
    for (row, t), (column, k) in product(enumerate(SETTINGS["T"]), enumerate(SETTINGS["k"])):
        near, classes = similarity[:, :k], labels[index[:, :k]]
        found = knn.votes(near, classes, t, SETTINGS["classes"])
        np.testing.assert_array_equal(
            first_classes(found), RECORDED["float64/pred5"][row, column], f"k {k}, T {t}"
        )
        share = found[np.arange(len(found)), query_labels] / found.sum(axis=1)
        recorded_share = RECORDED["float64/target_share"][row, column]
        np.testing.assert_allclose(share, recorded_share, rtol=1e-9, atol=1e-12)
        top1, top5 = knn.accuracy(near, classes, query_labels, t)
        assert 100 * top1 == pytest.approx(RECORDED["float64/top1"][row, column], abs=1e-9)
        assert 100 * top5 == pytest.approx(RECORDED["float64/top5"][row, column], abs=1e-9)
        if f"scores_k{k}_T{t}" in RECORDED:
            whole = found * np.exp(near[:, :1] / t)
            np.testing.assert_allclose(whole, RECORDED[f"scores_k{k}_T{t}"], rtol=1e-9)


def test_classes_without_a_vote_come_after_all_others():
    """The order of a thousand classes without votes is the original sort's own; ours ascends."""
    bank, labels, queries, _ = recorded()
    found = scores(bank, labels, queries, k=10, temperature=0.07, count=1000)
    voted = (found > 0).sum(axis=1)
    np.testing.assert_array_equal(voted, RECORDED["zeros1000/nonzero_classes"])
    ranked, original = first_classes(found), RECORDED["zeros1000/pred5_k10_T0.07"]
    for row, count in enumerate(voted):
        np.testing.assert_array_equal(ranked[row, :count], original[row, :count])
        assert (np.diff(ranked[row, count:]) > 0).all()


@pytest.mark.parametrize("name", list(SETTINGS["ties"]))
def test_recorded_ties(name):
    case, (bank, labels, queries, query_labels) = (
        SETTINGS["ties"][name],
        recorded(f"ties/{name}/"),
    )
    similarity, index = neighbours.neighbours(bank, queries, case["k"])
    found = knn.votes(similarity, labels[index], case["T"], case["classes"])
    top1, top5 = knn.accuracy(similarity, labels[index], query_labels, case["T"])
    if name == "boundary":  # the original does not say which of the equally near ones vote
        np.testing.assert_array_equal(index, [[0, 1, 2]])
        return
    assert (100 * top1, 100 * top5) == (case["top1"], case["top5"])
    order = RECORDED[f"ties/{name}/order"]
    np.testing.assert_array_equal(first_classes(found, order.shape[1]), order)
    whole = found * np.exp(similarity[:, :1] / case["T"])
    np.testing.assert_allclose(whole, RECORDED[f"ties/{name}/scores"], rtol=1e-9)


# ------------------------------------------------------------------------------ rows and errors


def folder(tmp_path, train, val, **settings):
    """A split of two folders of images."""
    for half, names in (("train", train), ("val", val)):
        write_images(tmp_path / half, names)
    roots = {"root": str(tmp_path / "train"), "eval_root": str(tmp_path / "val")}
    spec = make_spec({"name": "image_folder", **roots})
    return Split(spec.model_copy(update={"evaluate": EvaluateSpec(**settings)}))


SIX = [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(3)]


def test_several_settings_are_one_row_whose_own_are_the_first(tmp_path):
    split = folder(tmp_path, SIX, SIX, k=(3, 1, 5), temperature=(0.5, 0.07), per_class=(2,))
    whole, few = PROTOCOLS["knn"].rows(split, raw_pixels())
    assert (whole.k, whole.temperature, whole.main, few.main) == (3, 0.5, True, False)
    assert [(s["k"], s["temperature"]) for s in whole.grid] == list(product((3, 1, 5), (0.5, 0.07)))
    assert whole.grid[0]["top1"] == whole.top1
    assert whole.grid[2]["top1"] == 1.0, "each query is also in the bank"
    assert {s["k"] for s in few.grid} == {3, 1, 4}, "four images are labelled"
    assert len(whole.details()) == 6 and whole.details()[2].startswith("k 1, T 0.5: top-1 100.00 %")
    assert knn.KnnRow.model_validate(json.loads(json.dumps(whole.as_json())), strict=True) == whole
    for setting in whole.grid:
        keys = {name: setting[name] for name in ("k", "temperature")}
        evaluate = EvaluateSpec(**keys, per_class=())
        split.spec = split.spec.model_copy(update={"evaluate": evaluate})
        (alone,) = PROTOCOLS["knn"].rows(split, raw_pixels())
        assert (alone.top1, alone.top5) == (setting["top1"], setting["top5"])
        assert alone.grid == alone.details() == []


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (SIX[:4], SIX, r"evaluate.k: 5: more than the 4 labelled images"),
        (SIX[:3] + SIX[:3], SIX[:3], r"needs two classes, and all 3 training images .*: cat$"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_line(tmp_path, train, val, message):
    split = folder(tmp_path, train, val, k=(1, 5))
    with pytest.raises(UserError, match=message):
        PROTOCOLS["knn"].check(split)


class Relabelled:
    """A source with other labels."""

    def __init__(self, source, labels):
        self._source, self._labels = source, labels

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def label(self, index):
        return self._labels[index]


@pytest.mark.parametrize(
    ("half", "labels", "message"),
    [
        ("bank", [0, 1, -1, 0, 1, -1], "2 of the 6 training images of data.name image_folder"),
        ("queries", [-1] * 6, "6 of the 6 held-out images"),
        ("bank", [0, 0, 2, 2, 0, 0], "no training image has the class dog"),
    ],
)
def test_labels_that_a_classification_lacks_are_named(tmp_path, half, labels, message):
    split = folder(tmp_path, SIX, SIX, k=3)
    PROTOCOLS["knn"].check(split)
    setattr(split, half, Relabelled(getattr(split, half), labels))
    with pytest.raises(UserError, match=message):
        PROTOCOLS["knn"].check(split)
