"""Features in files: what an encoder gives to them, and evaluations of them in place of a model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOLERANCE, assert_close
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from support.data_specs import write_images
from support.feature_rows import rows
from support.golden_replay import spec_file
from support.golden_weights import GOLDEN, official_state

from triptych.core import cli, config
from triptych.core.api import get_model
from triptych.core.evaluation import shots
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.subject import Choice, encoder
from triptych.core.files.features import Header, read_features, writing
from triptych.core.formats import FORMATS
from triptych.core.launch import open_engine
from triptych.core.parameters import initial_state


def test_the_encoder_gives_the_features_of_the_published_protocols(backend, backend_name) -> None:
    """MOCA's k-NN and low-shot features, as the original program computed them."""
    spec = config.load(spec_file("moca_vit_tiny"), ["precision=float64", "threads=2"])
    state = FORMATS["moca"].to_canonical(official_state("moca_vit_tiny"), spec)
    images = np.random.Generator(np.random.Philox(key=4100)).standard_normal((4, 3, 64, 64))
    images = np.float32(images).astype(np.float64)
    with np.load(GOLDEN / "eval" / "features.npz") as golden:
        np.testing.assert_allclose(images.sum(), golden["image_sum"][0], rtol=1e-12)
        engine = open_engine(spec, backend_name, state)
        for name, tokens, final_norm, blocks in (
            ("knn_avg", "mean", True, 1),
            ("knn_cls", "cls", True, 1),
            ("lowshot_with_norm_blocks1", "mean", True, 1),
            ("lowshot_remove_norm_blocks1", "mean", False, 1),
            ("lowshot_remove_norm_blocks3", "mean", False, 3),
        ):
            subject = encoder(engine, 0, Choice("teacher", tokens, final_norm, blocks))
            assert_close(
                subject.embed(images), golden[name], TOLERANCE["float64"]["features"], name
            )
        name = "attention_last_block_cls_row"
        attention = engine.attention(images[:2], branch="teacher")
        assert_close(attention, golden[name], TOLERANCE["float64"]["features"], name)
        engine.close()


NAMES = [f"{kind}/{number}.png" for kind in ("ant", "bee", "cow") for number in range(6)]
SMALL = (
    *("data.workers=0", "data.name=image_folder", "data.on_error=skip"),
    *("model.width=8", "model.depth=3", "model.heads=2", "method.hidden_dim=8"),
    *("precision=float64", "evaluate.k=5", "evaluate.lowshot.shots=[2]", "evaluate.every=0"),
)


class Case:
    """Images of three classes and random weights on one backend, evaluated by command."""

    def __init__(self, folder: Path, backend_name: str, capsys: Any) -> None:
        self.folder, self.backend, self.capsys = folder, backend_name, capsys
        for half in ("train", "val"):
            write_images(folder / half, NAMES)
        roots = (f"data.root={folder}/train", f"data.eval_root={folder}/val")
        self.overrides = [*SMALL, *roots]
        spec = config.load("moco_v3/digits", self.overrides)
        np.savez(folder / "w.npz", **initial_state(spec))
        self.model = ["-c", "moco_v3/digits", "--weights", str(folder / "w.npz")]
        self.model += ["--backend", backend_name, "-o", *self.overrides]

    def run(self, *words: str, status: int = 0) -> str:
        assert cli.main(["eval", *words]) == status, self.capsys.readouterr()
        printed = self.capsys.readouterr()
        return str(printed.err if status else printed.out)

    def export(self, *extra: str, output: str = "x.npz") -> Path:
        path = self.folder / output
        self.run("features", "--output", str(path), *extra, *self.model)
        return path


@pytest.fixture
def case(tmp_path, backend, backend_name, capsys) -> Case:
    return Case(tmp_path, backend_name, capsys)


def test_exported_features_are_those_of_the_encoder(case) -> None:
    content = read_features(case.export("--layers", "0,2", "--tokens", "all", "--split", "both"))
    assert content.columns["name"].tolist() == NAMES * 2
    assert (
        content.columns["label"].tolist()
        == [0] * 6 + [1] * 6 + [2] * 6 + [0] * 6 + [1] * 6 + [2] * 6
    )
    assert content.columns["held_out"].tolist() == [False] * 18 + [True] * 18
    assert content.classes == ("ant", "bee", "cow")
    assert content.about["backend"] == case.backend and content.about["branch"] == "student"
    encoder = get_model(
        "moco_v3/digits", case.backend, case.folder / "w.npz", overrides=case.overrides
    )
    paths = [case.folder / "val" / name for name in NAMES]
    expected = encoder.encode(paths, tokens="all")
    np.testing.assert_allclose(content.features["final"][18:], expected, rtol=1e-10, atol=1e-12)
    assert {n: x.shape for n, x in content.features.items()} == dict.fromkeys(
        ("final", "layer0", "layer2"), (36, 17, 8)
    )
    # Only the last norm stands between the last block and the final features.
    tokens = content.features["layer2"]
    spread = np.sqrt(tokens.var(axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        (tokens - tokens.mean(axis=-1, keepdims=True)) / spread,
        content.features["final"],
        rtol=1e-6,
        atol=1e-9,
    )


def test_files_give_the_rows_that_the_model_gives(case) -> None:
    """Also with a damaged file on either side, and for raw outputs of the last two blocks."""
    (case.folder / "train" / NAMES[2]).write_text("broken")
    raw = ["evaluate.lowshot.final_norm=false", "evaluate.lowshot.blocks=2"]
    case.overrides.append("evaluate.per_class=[2]")
    case.model += ["evaluate.per_class=[2]", *raw]
    both = case.export("--layers", "1,2", "--tokens", "mean", "--split", "both")
    train, val = (
        case.export("--layers", "1,2", "--tokens", "mean", "--split", split, output=f"{split}.npz")
        for split in ("train", "held_out")
    )
    for name in ("knn", "lowshot"):
        direct = json.loads(case.run(name, "--json", "--tokens", "mean", *case.model))
        assert direct[0]["top1"] > 1 / 3
        for bank, queries in ((both, both), (train, val)):
            words = [name, "--json", "--bank", str(bank), "--queries", str(queries)]
            stored = json.loads(case.run(*words))
            # A file holds no trace of what it left out, and an unneeded damaged image is not met.
            for row in (*direct, *stored):
                row.pop("skipped", None)
            if name == "knn":
                assert stored == direct
            else:
                kept = ("top1", "each", "labelled", "lambda", "tokens", "blocks", "final_norm")
                assert len(stored) == len(direct) == 1
                assert stored[0].keys() == direct[0].keys() >= set(kept)


def test_knn_of_files_equals_scikit_learn(case) -> None:
    path = case.export("--split", "both")
    (row, *_) = json.loads(case.run("knn", "--json", "--bank", str(path), "--queries", str(path)))
    content = read_features(path)
    bank, queries = (content.half(held_out=half).columns for half in (False, True))
    other = KNeighborsClassifier(5, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    other.fit(bank["final"], bank["label"])
    assert row["top1"] == other.score(queries["final"], queries["label"])
    assert (row["k"], row["bank"], row["queries"]) == (5, 18, 18)


def test_lowshot_of_files_equals_scikit_learn(case) -> None:
    """Its logistic regression is called by hand, by the published call but for its tolerance."""
    path = case.export("--split", "both")
    words = ["lowshot", "--json", "--bank", str(path), "--queries", str(path), "--shots", "2,4"]
    found = json.loads(case.run(*words, "-o", "evaluate.lowshot.lambdas=[0.1,1.0]"))
    assert [(row["shots"], row["lambda"]) for row in found] == [
        *((2, 0.1), (2, 1.0), (4, 0.1), (4, 1.0))
    ]
    content = read_features(path)
    bank, queries = (content.half(held_out=half).columns for half in (False, True))
    spec = config.load("moco_v3/digits", case.overrides)
    images = Split(spec).catalogue()
    for row in found:
        each = []
        for seed in range(3):
            index = shots.drawn(row["shots"], seed, images).index
            train, test = (
                (x - x.mean(axis=1, keepdims=True))
                for x in (bank["final"][index], queries["final"])
            )
            train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
            solver = LogisticRegression(
                C=1 / row["lambda"], fit_intercept=False, solver="lbfgs", tol=1e-9, max_iter=300
            )
            solver.fit(train, bank["label"][index])
            each.append(solver.score(test, queries["label"]))
        assert row["each"] == each
        assert (row["top1"], row["std"]) == (np.mean(each), np.std(each))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["knn", "--bank", "x.npz"], "--bank and --queries belong together"),
        (["knn", "--weights", "w.npz"], "eval knn: -c is missing"),
        (["features", "--output", "y.npz", "-c", "moco_v3/digits"], "--weights is missing"),
        (["features", "--output", "y.txt"], "y.txt: a feature file ends in .npz, .parquet, .h5"),
        (["knn", "--bank", "x.npz", "--queries", "x.npz", "--tokens", "mean"], "holds tokens cls"),
        (
            ["knn", "--bank", "x.npz", "--queries", "x.npz", "--branch", "teacher"],
            "holds branch student, but teacher is asked for; give --branch student",
        ),
        (
            [
                *("lowshot", "--bank", "x.npz", "--queries", "x.npz"),
                *("-o", "evaluate.lowshot.interpolation=bicubic"),
            ],
            "holds interpolation bilinear, but bicubic is asked for",
        ),
        (
            [
                *("lowshot", "--bank", "x.npz", "--queries", "x.npz"),
                *("--shots", "1", "-o", "evaluate.lowshot.final_norm=false"),
            ],
            "x.npz: holds no layer2; export it with --layers 2",
        ),
    ],
)
def test_options_that_do_not_fit_are_one_clear_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    spec = config.load("moco_v3/digits", ["model.depth=3"])
    about = {"spec": config.dump(spec), "weights": "w", "step": 0, "depth": 3}
    about["interpolation"] = "bilinear"
    about |= {"branch": "student", "tokens": "cls"}
    with writing(Path("x.npz"), Header(("ant", "bee"), about, 4)) as append:
        append({**rows(0, 4), "label": np.array([0, 1, 0, 1])})
    assert cli.main(["eval", *words]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert said in errors


def test_a_file_of_unknown_origin_is_named(tmp_path, capsys) -> None:
    path = tmp_path / "x.npz"
    with writing(path, Header(("ant", "bee"), {"step": 0}, 4)) as append:
        append({**rows(0, 4), "label": np.array([0, 1, 0, 1])})
    words = ["eval", "knn", "--bank", str(path), "--queries", str(path)]
    for extra, said in (
        ((), "its spec is no YAML mapping"),
        (("-c", "moco_v3/digits"), "does not say its spec; export it again"),
    ):
        assert cli.main([*words, *extra]) == 2
        assert capsys.readouterr().err == f"error: {path}: {said}\n"


def test_an_earlier_file_is_replaced_with_force_only_and_weights_never(case) -> None:
    weights = (case.folder / "w.npz").read_bytes()
    path = case.export()
    before = path.read_bytes()
    for extra, output, said in (
        ((), "x.npz", "x.npz: exists; give another name, or --force to replace it"),
        ((), "w.npz", "w.npz: exists; give another name, or --force to replace it"),
        (("--force",), "w.npz", "w.npz: holds the weights; give another name"),
    ):
        words = ["features", "--output", str(case.folder / output), *extra, *case.model]
        assert said in case.run(*words, status=2)
    assert path.read_bytes() == before and (case.folder / "w.npz").read_bytes() == weights
    assert len(read_features(case.export("--force", "--split", "both")).columns["name"]) == 36


def test_files_of_other_widths_do_not_belong_together(case) -> None:
    path, other = case.export("--split", "both"), case.folder / "half.npz"
    with np.load(path) as content:
        arrays = dict(content)
    arrays["final"] = arrays["final"][:, :5]
    np.savez(other, **arrays)
    for protocol in ("knn", "lowshot", "probe", "rank"):
        files = ["--bank", str(path), "--queries", str(other)]
        said = f"error: {other}: final: 5 numbers an image, but 8 numbers in {path}; export both"
        assert case.run(protocol, *files, status=2).startswith(said)


def test_a_layer_or_a_split_that_is_not_there_is_named(case) -> None:
    start = ["features", "--output", str(case.folder / "x.npz")]
    errors = case.run(*start, "--layers", "3", *case.model, status=2)
    assert "--layers 3: 3: expected numbers from 0 to 2" in errors
    none = [*case.model, "data.eval_root=null"]
    errors = case.run(*start, "--split", "both", *none, status=2)
    assert "--split: data.name image_folder has no held-out images as it is given" in errors
    assert not (case.folder / "x.npz").exists()
