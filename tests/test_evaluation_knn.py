"""k-NN: against a loop over one pair at a time, against scikit-learn, and its rules for ties."""

import math

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from triptych.core.evaluation import knn


def loop(bank, labels, queries, k, temperature):
    """The definition, one query and one neighbour at a time."""
    predicted = []
    for query in queries:
        ranked = []
        for i, row in enumerate(bank):
            norms = math.sqrt((row**2).sum()) * math.sqrt((query**2).sum())
            similarity = sum(a * b for a, b in zip(row, query, strict=True)) / norms
            ranked.append((-round(similarity, knn.DECIMALS), i))
        votes = {}
        for negative, i in sorted(ranked)[:k]:
            votes[labels[i]] = votes.get(labels[i], 0.0) + math.exp(-negative / temperature)
        predicted.append(min(votes, key=lambda label: (-votes[label], label)))
    return np.array(predicted)


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
    found = knn.classify(bank, labels, queries, k=k, temperature=temperature)
    np.testing.assert_array_equal(found, loop(bank, labels, queries, k, temperature))


def test_the_parameters_matter(noisy):
    """The data above can tell one k, and one temperature, from another."""
    bank, labels, queries, _ = noisy
    one, all_, sharp = (
        knn.classify(bank, labels, queries, k=k, temperature=t)
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
    found = knn.classify(bank, labels, queries, k=k, temperature=temperature)
    np.testing.assert_array_equal(found, other.predict(queries))
    top1 = knn.accuracy(bank, labels, queries, query_labels, k=k, temperature=temperature)
    assert top1 == other.score(queries, query_labels)
    assert 0.3 < top1 < 1.0


@pytest.mark.parametrize(("queries_block", "bank_block"), [(1, 1), (7, 11), (30, 3)])
def test_blocks_do_not_matter(noisy, monkeypatch, queries_block, bank_block):
    bank, labels, queries, _ = noisy
    bank = np.vstack([bank, bank[::-1]])  # every neighbour is there twice
    labels = np.concatenate([labels, labels[::-1] ^ 1])
    whole = knn.classify(bank, labels, queries, k=7, temperature=0.07)
    monkeypatch.setattr(knn, "QUERIES", queries_block)
    monkeypatch.setattr(knn, "BANK", bank_block)
    np.testing.assert_array_equal(knn.classify(bank, labels, queries, k=7, temperature=0.07), whole)


def test_ties_go_to_the_front_of_the_bank_and_to_the_lower_class():
    bank = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    query = np.array([[5.0, 0.0]])
    # Equally near: the first in the bank are the neighbours.
    assert knn.classify(bank, np.array([4, 2, 2, 0]), query, k=1, temperature=0.1) == [4]
    # Equally many votes: the lower class wins.
    assert knn.classify(bank, np.array([4, 2, 3, 0]), query, k=3, temperature=0.1) == [2]
    assert knn.classify(bank, np.array([4, 2, 2, 0]), query, k=3, temperature=0.1) == [2]


def test_rounding_decides_no_tie():
    """One image at 50 lengths: unit rows and products differ in the last bits only."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        row, query = rng.standard_normal((2, 1, 33))
        bank = row * rng.uniform(0.1, 10.0, (50, 1))
        labels = np.arange(50)[::-1].copy()
        assert knn.classify(bank, labels, query, k=1, temperature=0.07) == [49]


def test_a_tiny_temperature_is_the_nearest_neighbour(noisy):
    bank, labels, queries, _ = noisy
    np.testing.assert_array_equal(
        knn.classify(bank, labels, queries, k=20, temperature=1e-6),
        knn.classify(bank, labels, queries, k=1, temperature=1.0),
    )


@pytest.mark.parametrize("k", [0, 61])
def test_k_beyond_the_bank_is_refused(noisy, k):
    bank, labels, queries, _ = noisy
    with pytest.raises(ValueError, match=f"expected 1 to 60.*got {k}"):
        knn.classify(bank, labels, queries, k=k, temperature=0.07)


def test_features_that_are_not_finite_are_refused(noisy):
    bank, labels, queries, _ = noisy
    with pytest.raises(ValueError, match="not finite"):
        knn.classify(np.where(bank == bank[3], np.nan, bank), labels, queries, k=5, temperature=1.0)


def test_few_labels_takes_so_many_of_each_class_and_always_the_same():
    labels = np.random.default_rng(0).integers(0, 5, 200)
    chosen = knn.few_labels(labels, 10)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [10] * 5)
    np.testing.assert_array_equal(chosen, knn.few_labels(labels, 10))
    assert (np.diff(chosen) > 0).all()
    # Not simply the first ones, and a class that has fewer gives what it has.
    assert not np.array_equal(chosen, np.sort(np.argsort(labels, kind="stable")[:50]))
    assert len(knn.few_labels(np.array([0, 0, 0, 1]), 2)) == 3
