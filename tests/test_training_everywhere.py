"""Training one spec on several backends, and the demonstration built on it."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import under_test

from triptych import backends
from triptych.core import cli
from triptych.core.commands import demo
from triptych.core.errors import UserError
from triptych.core.report import table
from triptych.core.runs.record import read_run
from triptych.core.training import everywhere

SHORT = [
    "data.workers=0",
    "train.steps=3",
    "train.batch_size=32",
    "optim.warmup_steps=1",
    "evaluate.every=3",
    "threads=1",
    "precision=float64",
    "log.tensorboard=false",
    "model.depth=1",
    "model.width=32",
    "method.hidden_dim=64",
]


def found_by(record):
    """The losses and accuracies of a run, which the time of day leaves alone."""
    accuracies = [(r.step, r.features, str(r.labels), r.top1, r.top5) for r in record.evaluations]
    return record.loss, accuracies


def test_every_backend_from_spec_to_page(tmp_path, capsys):
    """In float64 three steps leave no room for anything but rounding."""
    names = under_test()
    if not names:
        pytest.skip("no backend to train on")
    assert everywhere.run("moco_v3/digits", SHORT, names, tmp_path) == 0
    records = [read_run(tmp_path / name) for name in names]
    for name, record, row in zip(names, records, table.table(records), strict=True):
        assert record.backend == name and record.result is not None
        assert [step.step for step in record.steps] == [1, 2, 3]
        kinds = {(r.features, str(r.labels)) for r in record.evaluations}
        features = ("trained", "random init", "raw pixels")
        assert kinds == {(f, labels) for f in features for labels in ("all", "10")}
        assert row.difference is None or row.difference <= 1e-12
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in names)
    assert "<figure>" in (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match="exit status 2"):
        everywhere.run("moco_v3/digits", SHORT, names[:1], tmp_path)
    command = ["parity", "run", "-c", "moco_v3/digits", "--backends", names[0]]
    command += ["--output", str(tmp_path), "--resume", "auto", "-o", *SHORT]
    assert cli.main(command) == 0
    assert found_by(read_run(tmp_path / names[0])) == found_by(records[0])
    assert f"\n{names[0]} " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"evaluate.k 20, now 3; give another --output"):
        everywhere.run(
            "moco_v3/digits", [*SHORT, "evaluate.k=3"], names[:1], tmp_path, resume="auto"
        )


def test_a_run_that_fails_is_named(tmp_path):
    with pytest.raises(UserError, match=r"torch: .* exit status 2; see .*torch.log"):
        everywhere.train_all("no/such/recipe", [], ["torch"], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot write"):
        everywhere.train_all("moco_v3/digits", [], ["torch"], tmp_path / "file")


def test_a_run_that_was_stopped_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(everywhere, "_wait", lambda child, log: child.wait() and 143)
    with pytest.raises(SystemExit) as stop:
        everywhere.train_all("no/such/recipe", [], ["torch"], tmp_path)
    assert stop.value.code == 143


def test_backends_are_checked_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda: ())
    for names in (None, [], ["torch"], ["numpy"]):
        with pytest.raises(UserError, match="backend"):
            everywhere.run("moco_v3/digits", [], names, tmp_path)
    with pytest.raises(UserError, match="no backend to train on"):
        demo.demonstrate(["none"], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_request_to_stop_reaches_the_run(tmp_path, number):
    """The child saves and leaves; the parent must neither die before it nor leave it behind."""
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, sys, time\n"
            f"signal.signal({int(number)}, lambda *_: sys.exit(7))\n"
            "print(flush=True)\n"
            "time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    child.stdout.readline()
    (tmp_path / "log").write_text("step 1\nstep 2")
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    handler = signal.getsignal(number)
    assert everywhere._wait(child, tmp_path / "log") == 7
    assert signal.getsignal(number) == handler
    child.stdout.close()


def test_a_run_that_a_signal_ended_before_it_began_has_that_status(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (tmp_path / "log").write_text("")
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert everywhere._wait(child, tmp_path / "log") == 128 + signal.SIGTERM


def test_demo_replaces_its_own_runs_only(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda: ("torch",))
    called = []
    monkeypatch.setattr(everywhere, "run", lambda *arguments: called.append(arguments) or 0)
    earlier = tmp_path / "torch"
    (earlier / "checkpoints").mkdir(parents=True)
    (earlier / "spec.yaml").write_text("")
    other = tmp_path / "oneflow"
    other.mkdir()
    demo.demonstrate([], tmp_path)
    assert called == [(demo.RECIPE, [], ("torch",), tmp_path)]
    assert not earlier.exists() and other.exists()


def test_demo_under_a_launcher_removes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_dir = demo.OUTPUT / "torch"
    run_dir.mkdir(parents=True)
    (run_dir / "spec.yaml").touch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["demo", "torch"]) == 2
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE=2: ")
    assert (run_dir / "spec.yaml").exists()


def test_demo_all_goes_through_every_short_recipe(monkeypatch):
    called = []
    monkeypatch.setattr(demo, "demonstrate", lambda *arguments: called.append(arguments))
    assert cli.main(["demo", "--all", "torch"]) == 0
    recipes = ["moco_v1/digits", "moco_v2/digits", "moco_v3/digits", "moco_v3/digits_resnet"]
    assert [recipe for _, _, recipe in called if recipe in recipes] == recipes
    assert {tuple(names) for names, _, _ in called} == {("torch",)}
    assert len({output for _, output, _ in called}) == len(called)


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_demo_never_removes_what_is_not_a_run(tmp_path, kind):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    place = tmp_path / "torch"
    if kind == "file":
        place.write_text("notes")
    elif kind == "folder":
        precious.rename(place)
    else:
        (precious / "spec.yaml").write_text("")
        place.symlink_to(precious)
    with pytest.raises(UserError, match="not the run of an earlier demo"):
        demo.clear(place)
    assert place.exists() and len(list(tmp_path.rglob("thesis.tex"))) == 1
