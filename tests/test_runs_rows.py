"""Evaluation rows: of known protocols, of others, and of splits with damaged files."""

import json

import pytest
from support.data_specs import write_images
from support.double import finished, install, saved, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from triptych.core.errors import UserError
from triptych.core.runs.log import read_rows
from triptych.core.runs.record import read_run
from triptych.core.runs.rows import evaluation
from triptych.core.training import run


@pytest.fixture(autouse=True)
def numpy_backend(monkeypatch):
    install(monkeypatch)


def test_the_evaluation_line():
    row = {
        **{"step": 5, "labels": 10, "top1": 0.83214, "k": 20, "temperature": 0.07, "bank": 100},
        **{"branch": "student", "tokens": "cls", "queries": 360},
    }
    row = evaluation({"eval": "knn", **row})
    assert row.line() == (
        "step 5 k-NN top-1 83.21 % (10 labels per class, k 20, T 0.07, student cls, "
        "100 labelled, 360 queries)"
    )
    damaged = row.model_copy(update={"skipped": 2})
    assert damaged.line().endswith("360 queries, damaged files left out: 2)")
    assert evaluation({"eval": "captions", "step": 5, "top1": 0.5}).line() == (
        "step 5 captions top-1 50.00 %"
    )
    assert evaluation({"eval": "export", "step": 5}).line() == "step 5 export"


UNKNOWN = (
    {"eval": "captions", "step": 6, "top1": 83.2, "labels": "all", "tokens": ["cls", "mean"]},
    {"eval": "detection", "step": 6, "time": 1.0, "top1": 0.5, "grid": {"cost": [0.1, 1.0]}},
)
"""Rows as another version may write them."""


def test_evaluations_that_are_not_known_survive_a_resume(tmp_path):
    keys = ["log.tensorboard=true", "evaluate.every=6"]
    path = finished(tiny(*keys, "train.stop_at=6"), tmp_path) / "metrics.jsonl"
    before = read_rows(path)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in UNKNOWN)
    finished(tiny(*keys), tmp_path, resume="auto")
    after = read_rows(path)
    assert after[: len(before) + 2] == [*before, *UNKNOWN]
    assert [row["step"] for row in after if "eval" not in row] == [1, 3, 6, 9, 12]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("detection/top1")] == [(6, 0.5)]
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["eval"] for row in result["evaluations"]][2:4] == ["captions", "detection"]


STRANGE = (
    {"eval": "captions"},
    {"eval": ["captions"], "step": 6},
    {"eval": None, "step": 6.5},
    {"note": "the room was warm"},
)
"""Rows without the least that a reader needs."""


def test_rows_that_nothing_is_known_of_are_passed_over_and_kept(tmp_path):
    path = finished(tiny("train.stop_at=6"), tmp_path) / "metrics.jsonl"
    first, *others = path.read_text().splitlines()
    lines = [first, *map(json.dumps, STRANGE), "", *others]
    path.write_text("".join(f"{line}\n" for line in lines))
    steps = [row.step for row in read_run(tmp_path).steps]
    finished(tiny(), tmp_path, resume="auto")
    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert after[1 : 1 + len(STRANGE)] == list(STRANGE)
    assert [row["step"] for row in read_rows(path)] == [*steps, 9, 12] == [1, 3, 6, 9, 12]


def test_a_log_that_is_cut_at_a_damaged_line_is_told(tmp_path, capsys):
    path = finished(tiny("train.stop_at=6"), tmp_path) / "metrics.jsonl"
    path.write_text("{]\n" + path.read_text())
    finished(tiny(), tmp_path, resume="auto")
    told = capsys.readouterr().out.splitlines()
    assert f"warning: {path}: line 1 is damaged; the log ends before it" in told


def test_held_out_images_that_are_damaged_cost_no_trained_step(tmp_path, capsys):
    images = tmp_path / "val" / "a" / "0.png", tmp_path / "val" / "a" / "2.png"
    for half in ("train", "val"):
        write_images(tmp_path / half, [f"{'ab'[number % 2]}/{number}.png" for number in range(16)])
    roots = [f"data.root={tmp_path / 'train'}", f"data.eval_root={tmp_path / 'val'}"]
    keys = [
        *roots,
        "data.name=image_folder",
        "data.on_error=skip",
        "evaluate.every=6",
        "evaluate.k=8",
    ]
    for path in images:
        path.write_text("broken")
    folder = finished(tiny(*keys), tmp_path / "some")
    told = capsys.readouterr().out.splitlines()
    left_out = [line for line in told if "left out of the evaluation" in line]
    assert left_out == [f"damaged, left out of the evaluation: {path}" for path in images]
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "eval" in row]
    assert [(row["step"], row["skipped"]) for row in rows if row["labels"] == "all"] == [
        (6, 2),
        (12, 2),
    ]
    for path in (tmp_path / "val").glob("*/*.png"):
        path.write_text("broken")
    with pytest.raises(UserError, match=r"all 16 images are damaged"):
        run.train(tiny(*keys, "checkpoint.every=0"), "torch", tmp_path / "none")
    assert saved(tmp_path / "none") == ["step-00000006"]


def test_names_of_damaged_files_are_escaped(tmp_path, capfd):
    for half in ("train", "val"):
        write_images(tmp_path / half, [f"{c}/{i}.png" for c in "ab" for i in range(4)])
        (tmp_path / half / "b" / f"{half}\x1b[2J.png").write_text("broken")
    roots = (f"data.root={tmp_path / 'train'}", f"data.eval_root={tmp_path / 'val'}")
    keys = ("data.name=image_folder", "data.channels=1", "data.on_error=skip", "evaluate.every=2")
    steps = ("train.batch_size=9", "train.steps=2", "optim.warmup_steps=0", "evaluate.k=8")
    finished(tiny(*roots, *keys, *steps), tmp_path / "run")
    printed = capfd.readouterr().out
    for line in (
        f"damaged, skipped: {tmp_path}/train/b/train\\x1b[2J.png",
        f"damaged, left out of the evaluation: {tmp_path}/val/b/val\\x1b[2J.png",
    ):
        assert line in printed.splitlines()
    assert "\x1b" not in printed
