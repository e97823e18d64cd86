"""The evaluation benchmark: its alternatives compute the same, and each is measured."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from triptych.core.benchmarks import eval as benchmark
from triptych.core.cli import main

SIZES = ("--bank", "9000", "--queries", "40", "--width", "16", "--k", "7", "--rounds", "1")


def test_the_alternatives_find_the_same_neighbours(backend_name):
    sizes = {"bank": 9000, "queries": 300, "width": 16, "k": 7}
    sizes = SimpleNamespace(**sizes, threads=1, backend=backend_name)
    similarity, index = benchmark._search(sizes)["triptych"]()
    for name, task in benchmark._search(sizes).items():
        other, place = task()
        np.testing.assert_array_equal(place, index, name)
        np.testing.assert_allclose(other, similarity, atol=1e-5, err_msg=name)


def test_neighbours_are_measured(capsys):
    assert main(["bench", "eval", "knn", "--json", *SIZES]) == 0
    result = json.loads(capsys.readouterr().out)["knn"]
    names = ["triptych", "scikit-learn", "all pairs"]
    assert list(result["seconds"]) == list(result["peak_mib"]) == names
    assert list(result["speed_over"]) == names[1:]
    assert all(peak > 20 for peak in result["peak_mib"].values())
    assert (result["rounds"], result["threads"]) == (1, 1)
    assert result["versions"]["numpy"] == np.__version__


@pytest.mark.soak
def test_the_extraction_of_features_is_measured(backend, backend_name, capsys):
    small = ["model.width=16", "model.heads=2", "model.depth=1", "model.image_size=32"]
    command = ["bench", "eval", "features", "--images", "3", "--rounds", "1"]
    assert main([*command, "--backend", backend_name, "-o", *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 round, 1 thread; python ")
    assert [line.split()[:2] for line in lines[2:]] == [
        ["features", "triptych"],
        ["features", "plain"],
    ]


@pytest.mark.slow
@pytest.mark.one_backend
def test_a_step_of_all_heads_is_a_step_of_the_recipes_probe(backend, backend_name, monkeypatch):
    heads = []
    honest = benchmark.launch.open_engine

    def opened(spec, *arguments):
        heads.append(len(spec.method.probes))
        return honest(spec, *arguments)

    monkeypatch.setattr(benchmark.launch, "open_engine", opened)
    small = ["model.width=16", "model.heads=2", "model.depth=1", "model.image_size=32"]
    sizes = SimpleNamespace(threads=1, images=3, backend=backend_name, overrides=small)
    tasks = benchmark._heads(sizes)
    assert dict(zip(tasks, heads, strict=True)) == {"all rates": 45, "one rate": 1}
    for task in tasks.values():
        task()


@pytest.mark.parametrize("words", [("--k", "0"), ("--rounds", "0"), ("--bank", "5")])
def test_numbers_that_make_no_sense_are_refused(words, capsys):
    assert main(["bench", "eval", "knn", *words]) == 2
    assert f"{words[0] if words[0] != '--bank' else '--k'} " in capsys.readouterr().err
