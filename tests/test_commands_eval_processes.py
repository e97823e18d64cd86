"""``eval`` under a framework's launcher: the processes share the images, and no number changes."""

import json
from argparse import Namespace

import numpy as np
import pytest
from support.launchers import Launch
from support.processes import PipeRanks, together

from triptych.core import config
from triptych.core.cli import main
from triptych.core.commands.eval.model import check_alike
from triptych.core.errors import UserError
from triptych.core.files.checksum import state_digest
from triptych.core.files.features import read_features

LIMIT = 100.0
"""Seconds for the two processes."""
SMALL = (
    *("-o", "model.depth=2", "model.width=16", "model.image_size=8", "precision=float64"),
    *("threads=1", "data.workers=0", "evaluate.per_class=[5]", "evaluate.lowshot.shots=[2]"),
)
ENCODER = ("-c", "moco_v3/digits", *SMALL, "method.hidden_dim=32", "method.output_dim=16")
PARALLEL = "parallel.tensor=2"
"""Of the training that the spec describes."""


def shared(backend_name, folder, words, status=0):
    """What two processes say about an evaluation."""
    launch = Launch(backend_name, 2, words, folder)
    try:
        assert (launch.finish(LIMIT) == 0) == (status == 0), launch.said()
    finally:
        launch.kill()
    return launch


def rows_of(said):
    """The rows in the output, in which nothing else begins with a bracket."""
    lines = said.splitlines()
    return json.loads("\n".join(lines[lines.index("[") : lines.index("]") + 1]))


def test_two_processes_give_the_rows_of_one(backend, backend_name, tmp_path, capsys):
    words = ["eval", "knn", *ENCODER, "--weights", "initial", "--json", "--backend", backend_name]
    assert main(words) == 0
    alone = json.loads(capsys.readouterr().out)
    launch = shared(backend_name, tmp_path / "two", [*words, "-o", PARALLEL])
    assert rows_of(launch.said()) == alone
    printed = 2 if backend_name == "paddle" else 1  # its launcher repeats the first process
    assert launch.said().splitlines().count("[") == printed, "the main process alone prints"


@pytest.mark.parallel
@pytest.mark.parametrize("evaluation", ["lowshot", "classifier"])
def test_two_processes_give_the_rows_of_one_by_the_other_protocols(
    backend, backend_name, evaluation, tmp_path, capsys
):
    words = ["eval", evaluation, *ENCODER]
    if evaluation == "classifier":
        words = ["eval", "finetune", "-c", "moco_v3/digits_finetune", "--eval-only", *SMALL]
    words += ["--weights", "initial", "--json", "--backend", backend_name]
    assert main(words) == 0
    alone = json.loads(capsys.readouterr().out)
    assert rows_of(shared(backend_name, tmp_path / "two", words).said()) == alone


@pytest.mark.one_backend
def test_two_processes_write_the_file_of_one(backend, backend_name, tmp_path):
    words = ["eval", "features", *ENCODER, "--weights", "initial", "--tokens", "all"]
    words += ["--layers", "0", "--split", "both", "--backend", backend_name]
    assert main([*words, "--output", str(tmp_path / "one.npz")]) == 0
    shared(backend_name, tmp_path / "two", [*words, "--output", str(tmp_path / "two.npz")])
    one, two = (read_features(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert one.about == two.about and list(one.columns) == list(two.columns)
    for name, column in one.columns.items():
        np.testing.assert_array_equal(column, two.columns[name], err_msg=name)


@pytest.mark.one_backend
def test_an_error_is_told_once_and_leaves_no_file(backend, backend_name, tmp_path):
    words = ["eval", "features", *ENCODER, "--weights", str(tmp_path / "none.pth")]
    words += ["--output", str(tmp_path / "x.npz"), "--backend", backend_name]
    launch = shared(backend_name, tmp_path / "two", words, status=2)
    (line,) = launch.errors()
    assert "none.pth" in line and not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"evaluation": "rank"}, "evaluation (knn on process 0, rank on process 1)"),
        ({"layers": "1"}, "--layers (0 on process 0, 1 on process 1)"),
        ({"seed": 7}, "seed (0 on process 0, 7 on process 1)"),
        (
            {"weights": 2.0},
            f"weights ({state_digest({'w': np.array(1.0)})} on process 0, "
            f"{state_digest({'w': np.array(2.0)})} on process 1)",
        ),
    ],
)
def test_processes_that_evaluate_something_else_are_refused_by_name(change, said):
    def work(ranks):
        given = {"evaluation": "knn", "layers": "0", "seed": 0, "weights": 1.0}
        given |= change if ranks.rank else {}
        spec = config.load("moco_v3/digits", [f"seed={given['seed']}"])
        check_alike(Namespace(**given), ranks, spec, {"w": np.array(given["weights"])}, ())

    first, second = together(2, outcome, work)
    assert first.startswith(f"the 2 processes differ in {said}; start all of them")
    assert second == ""


def outcome(mesh, work):
    """The error of one process."""
    with pytest.raises(UserError) as caught:
        work(PipeRanks(mesh))
    return str(caught.value)


def test_what_needs_no_encoder_refuses_a_launcher(monkeypatch, tmp_path, capsys):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for words, said in (
        (["--bank", "a.npz", "--queries", "b.npz"], "--bank and --queries"),
        (["-c", "moco_v3/digits", "--weights", "pixels"], "--weights pixels"),
    ):
        assert main(["eval", "knn", *words]) == 2
        assert f"eval of {said} runs in one process" in capsys.readouterr().err
