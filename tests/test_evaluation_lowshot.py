"""Low-shot: against the numbers of the original program, its drawn and listed images, its rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from support.data_specs import make_spec, write_images

from triptych.core import cli, config
from triptych.core.config.evaluate import EvaluateSpec
from triptych.core.data import Subset
from triptych.core.errors import UserError
from triptych.core.evaluation import PROTOCOLS, lowshot, shots
from triptych.core.evaluation.split import Catalogue, Split
from triptych.core.evaluation.subject import Choice, raw_pixels
from triptych.core.parameters import initial_state

GOLDEN = Path(__file__).parent / "golden" / "eval"
FITS = json.loads((GOLDEN / "lowshot.json").read_text())["fits"]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "lowshot.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", FITS)
def test_weights_and_accuracies_are_those_of_the_exact_minimum(golden, name) -> None:
    index = golden[f"{name.split('_lambda')[0]}/index"]
    labels = golden["pool_labels"][index]
    features = lowshot.prepare(golden["pool_raw"][index])
    weight = lowshot.fit(features, labels, FITS[name]["lambda"])
    exact = golden[f"{name}/exact_weight"]
    assert np.abs(weight - exact).max() < 1e-8 * np.abs(exact).max()
    queries = lowshot.prepare(golden["test_raw"])
    np.testing.assert_allclose(queries, golden["test_processed"], rtol=0, atol=1e-15)
    top1 = np.mean(lowshot.predict(weight, queries) == golden["test_labels"])
    assert top1 == FITS[name]["exact_test_acc"]


def test_two_classes_are_a_softmax_with_two_rows(golden) -> None:
    """The minimum is found by its gradient, which a sigmoid of one row with C = 1/lambda lacks."""
    index = np.flatnonzero(np.isin(golden["pool_labels"], (2, 5)))
    labels = (golden["pool_labels"][index] == 5).astype(np.int64)
    features = lowshot.prepare(golden["pool_raw"][index])

    def gradient(weight: np.ndarray) -> np.ndarray:
        scores = np.exp(features @ weight.T)
        residual = scores / scores.sum(axis=1, keepdims=True) - np.eye(2)[labels]
        return residual.T @ features + 0.1 * weight

    weight = lowshot.fit(features, labels, 0.1)
    assert weight.shape == (2, 32)
    assert np.abs(gradient(weight)).max() < 1e-10
    (row,) = LogisticRegression(C=10, fit_intercept=False, tol=1e-10).fit(features, labels).coef_
    assert np.abs(gradient(np.stack([-row / 2, row / 2]))).max() > 0.01


def test_preparation_can_be_switched_off() -> None:
    rows = np.array([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])
    plain = lowshot.prepare(rows, center=False, normalize=False)
    np.testing.assert_array_equal(plain, rows)
    np.testing.assert_array_equal(lowshot.prepare(rows, normalize=False)[0], [-2.0, -1.0, 3.0])
    unit = lowshot.prepare(rows, center=False)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), [1.0, 0.0])


def test_a_minimum_that_is_not_reached_is_an_error(golden, monkeypatch) -> None:
    features = lowshot.prepare(golden["pool_raw"])
    monkeypatch.setattr(lowshot, "ITERATIONS", 2)
    with pytest.raises(UserError, match=r"lowshot\.lambdas: 0\.001: no minimum after 2"):
        lowshot.fit(features, golden["pool_labels"], 0.001)


def catalogue(counts: tuple[int, ...] = (7, 4, 9)) -> Catalogue:
    """Images of the classes n0, n1 …, shuffled, and one image without a label."""
    labels = np.concatenate([np.repeat(np.arange(len(counts)), counts), [-1]])
    labels = np.random.default_rng(1).permutation(labels)
    classes = tuple(f"n{label}" for label in range(len(counts)))
    return Catalogue(lambda i: f"n{labels[i]}/n{labels[i]}_{i}.JPEG", labels, classes)


def test_drawn_images_are_so_many_of_each_class_nested_and_the_seeds_own() -> None:
    images = catalogue()
    one, two, again, other = (
        shots.drawn(count, seed, images) for count, seed in ((1, 0), (2, 0), (2, 0), (2, 1))
    )
    assert np.bincount(images.labels[two.index]).tolist() == [2, 2, 2]
    assert set(one.index) < set(two.index)
    np.testing.assert_array_equal(two.index, again.index)
    assert (np.diff(two.index) > 0).all()
    assert two.index.tolist() != other.index.tolist()
    assert two.digest(images) == again.digest(images) != other.digest(images)
    # 7, 4 and 9 images: a third is 2.31, 1.32 and 2.97. A small share is still one image.
    third = shots.drawn("33%", 0, images)
    assert np.bincount(images.labels[third.index]).tolist() == [2, 1, 3]
    assert np.bincount(images.labels[shots.drawn("1%", 0, images).index]).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("counts", "label", "said"),
    [
        ((7, 4, 9), 5, "evaluate.lowshot.shots: 5: class 'n1' has only 4 images; lower it"),
        ((7, 0, 9), 1, "the training split: no labelled image of 1 of the 3 classes: 'n1'"),
    ],
)
def test_a_class_with_too_few_images_is_named(counts, label, said) -> None:
    with pytest.raises(UserError, match=said) as caught:
        shots.drawn(label, 0, catalogue(counts))
    assert "\n" not in str(caught.value)


def test_a_list_names_images_by_file_or_by_path(tmp_path) -> None:
    images = catalogue()
    first = [int(np.flatnonzero(images.labels == label)[0]) for label in range(3)]
    names = [images.name(position) for position in first]
    (tmp_path / "a.txt").write_text("\n".join(name.split("/")[1] for name in names) + "\n\n")
    (tmp_path / "b.txt").write_text("\r\n".join(reversed(names)))
    plain, whole = (shots.listed(str(tmp_path / f"{n}.txt"), images) for n in "ab")
    assert plain.index.tolist() == whole.index.tolist() == sorted(first)
    assert (plain.label, plain.origin) == (1, str(tmp_path / "a.txt"))
    # Four of 21 images, not as many of each class: their share.
    more = images.name(int(np.flatnonzero(images.labels == 2)[1]))
    (tmp_path / "c.txt").write_text("\n".join([*names, more]))
    assert shots.listed(str(tmp_path / "c.txt"), images).label == "19%"


def test_a_file_name_in_two_classes_is_the_one_of_its_prefix(tmp_path) -> None:
    names = ["n0/n0_1.JPEG", "n1/n0_1.JPEG", "n1/7.png", "n0/7.png"]
    labels = np.array([0, 1, 1, 0])
    images = Catalogue(names.__getitem__, labels, ("n0", "n1"))
    (tmp_path / "a.txt").write_text("n0_1.JPEG\nn1/7.png")
    assert shots.listed(str(tmp_path / "a.txt"), images).index.tolist() == [0, 2]
    (tmp_path / "b.txt").write_text("n0_1.JPEG\n7.png")
    with pytest.raises(UserError, match=r"'7\.png' is the name of 2 images: 'n1/7.png', 'n0/"):
        shots.listed(str(tmp_path / "b.txt"), images)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("", "no image in this list"),
        ("n0_0.JPEG\nx.png\ny.png", "2 of its 3 images are not in the training split: 'x.png'"),
        ("0.png\n1.png", "no labelled image of 1 of the 2 classes: 'n1'"),
        ("0.png\n2.png\n0.png", "it names 1 images twice"),
        ("3.png", "'3.png' has no label"),
        ("x" * 500, f"1 of its 1 images are not in the training split: '{'x' * 97}[.]{{3}}'$"),
    ],
)
def test_a_list_that_does_not_fit_is_one_clear_line(tmp_path, content, said) -> None:
    labels = np.array([0, 0, 1, -1, 0])
    names = ["0.png", "1.png", "2.png", "3.png", "n0_0.JPEG"]
    images = Catalogue(names.__getitem__, labels, ("n0", "n1"))
    path = tmp_path / "split.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"evaluate.lowshot.files: {path}: {said}") as caught:
        shots.listed(str(path), images)
    assert "\n" not in str(caught.value)


NAMES = [f"{kind}/{number}.png" for kind in ("ant", "bee", "cow") for number in range(6)]


def folders(tmp_path: Path, **settings: Any) -> Split:
    """18 images of three classes, which are also the queries."""
    write_images(tmp_path / "train", NAMES)
    root = str(tmp_path / "train")
    spec = make_spec(
        {"name": "image_folder", "root": root, "eval_root": root, "on_error": "skip", "workers": 0}
    )
    section = EvaluateSpec.model_validate({"lowshot": settings})
    return Split(spec.model_copy(update={"evaluate": section}))


def test_rows_are_the_mean_and_deviation_over_splits(tmp_path) -> None:
    split = folders(tmp_path, shots=[2, "50%"], seeds=[0, 1, 2, 3], lambdas=[0.1, 10.0])
    rows = PROTOCOLS["lowshot"].rows(split, raw_pixels())
    assert [(row.shots, row.penalty) for row in rows] == [
        (2, 0.1),
        (2, 10.0),
        ("50%", 0.1),
        ("50%", 10.0),
    ]
    features = split.features(raw_pixels())
    queries = lowshot.prepare(features.queries.features)
    bank = lowshot.prepare(features.bank.features)
    for row in rows:
        each = []
        for seed in range(4):
            index = shots.drawn(row.shots, seed, split.catalogue()).index
            solver = LogisticRegression(C=1 / row.penalty, fit_intercept=False, tol=1e-10)
            solver.fit(bank[index], features.bank.labels[index])
            each.append(solver.score(queries, features.queries.labels))
        assert row.each == tuple(each)
        assert (row.top1, row.std) == (np.mean(each), np.std(each))
        assert row.origins == (0, 1, 2, 3) and len(set(row.digests)) == 4
        assert row.labelled == ((6,) * 4 if row.shots == 2 else (9,) * 4)
    assert 0 < rows[0].std and rows[0].top1 > 1 / 3
    stored = json.loads(json.dumps(rows[0].as_json()))
    assert stored["lambda"] == 0.1 and "penalty" not in stored
    assert PROTOCOLS["lowshot"].row.model_validate(stored) == rows[0]
    assert "low-shot top-1" in rows[0].line() and "2 per class, lambda 0.1" in rows[0].line()


def test_only_labelled_images_and_queries_are_read(tmp_path) -> None:
    """A damaged image of the bank that no split needs is not met."""
    split = folders(tmp_path, shots=[2], seeds=[0])
    used = set(shots.drawn(2, 0, split.catalogue()).index.tolist())
    unused = next(i for i in range(18) if i not in used)
    Path(split.bank.name(unused)).write_text("broken")
    split.queries = Subset(split.bank, np.delete(np.arange(18), unused))
    (row,) = PROTOCOLS["lowshot"].rows(split, raw_pixels())
    assert (row.skipped, row.labelled, row.queries) == (0, (6,), 17)


def test_images_are_resized_by_the_protocol_s_own_interpolation(tmp_path) -> None:
    split = folders(tmp_path, shots=[2], seeds=[0])
    plain = raw_pixels()
    cubic = replace(plain, choice=replace(plain.choice, interpolation="bicubic"))
    one, other = (split.features(subject).queries.features for subject in (plain, cubic))
    augment = split.spec.augment.model_copy(update={"eval_interpolation": "bicubic"})
    same = Split(split.spec.model_copy(update={"augment": augment})).features(plain)
    assert np.abs(one - other).max() > 0.01
    np.testing.assert_array_equal(same.queries.features, other)
    rows = [PROTOCOLS["lowshot"].rows(split, subject)[0] for subject in (plain, cubic)]
    assert [row.interpolation for row in rows] == ["bilinear", "bicubic"]
    published = config.load("moca/v1_0_vit_base")
    choice = PROTOCOLS["lowshot"].choice(published.evaluate)
    assert choice == Choice("teacher", "mean", False, 1, "bilinear")


def test_a_class_whose_labelled_images_are_all_damaged_is_an_error(tmp_path) -> None:
    split = folders(tmp_path, shots=[1], seeds=[0])
    (position,) = (
        i for i in shots.drawn(1, 0, split.catalogue()).index if split.bank.label(i) == 1
    )
    Path(split.bank.name(position)).write_text("broken")
    with pytest.raises(UserError, match="split 0: all images of a class are damaged"):
        PROTOCOLS["lowshot"].rows(split, raw_pixels())


def test_the_spec_says_what_it_takes() -> None:
    for change, said in (
        ("evaluate.lowshot.shots=[0]", "expected an integer > 0"),
        ("evaluate.lowshot.shots=[1/2]", "'1/2': expected a number, or a share like 1%"),
        ("evaluate.lowshot.shots=[0%]", "'0%': expected a number, or a share like 1%"),
        ("evaluate.lowshot.seeds=[]", "expected at least one"),
        ("evaluate.lowshot.blocks=2", "only the last block has that norm"),
    ):
        with pytest.raises(UserError, match=said):
            config.load("moco_v3/digits", [change])


def test_the_command_evaluates_weights_by_drawn_and_listed_images(
    backend, backend_name, tmp_path, capsys
) -> None:
    small = ["model.width=8", "model.depth=2", "model.heads=2", "method.hidden_dim=8"]
    spec = config.load("moco_v3/digits", small)
    np.savez(tmp_path / "w.npz", **initial_state(spec))
    common = ["eval", "lowshot", "-c", "moco_v3/digits", "--backend", backend_name]
    common += ["--weights", str(tmp_path / "w.npz"), "--json", "-o", "data.workers=0", *small]

    def rows(*extra: str) -> list[dict[str, Any]]:
        assert cli.main([*common, *extra]) == 0
        return json.loads(capsys.readouterr().out)

    raw = ["evaluate.lowshot.final_norm=false", "evaluate.lowshot.blocks=2"]
    (one, two) = rows("--shots", "1,2", "--tokens", "mean", "-o", *raw)
    assert (one["shots"], two["shots"]) == (1, 2)
    assert 0.1 < one["top1"] < 1 and len(one["each"]) == 3
    assert (one["tokens"], one["final_norm"], one["blocks"]) == ("mean", False, 2)
    images = Split(spec).catalogue()
    drawn = [shots.drawn(2, seed, images) for seed in range(3)]
    files = [tmp_path / f"{seed}.txt" for seed in range(3)]
    for path, split in zip(files, drawn, strict=True):
        path.write_text("\n".join(images.name(int(position)) for position in split.index))
    (listed,) = rows("--splits", *map(str, files), "--tokens", "mean", "-o", *raw)
    assert listed == {**two, "origins": [str(path) for path in files]}
