"""Runs of two processes: their launcher or one of them gets a signal, on every backend."""

import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import rank_kills
from support.kills import compare, last_step, wait_until
from support.launchers import Launch
from support.rank_kills import AXES, MOMENTS, SMALL, Campaign, Kill

import triptych.core

SEED = 20
"""Of the moments of all campaigns; a failure comes back with it."""


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("axis", AXES)
def test_ten_kills_of_one_process_change_no_bit(backend, backend_name, tmp_path, axis):
    words = ["--backend", backend_name, "--axis", axis, "--seed", str(SEED)]
    assert rank_kills.main([*words, "--output", str(tmp_path)]) == 0


@pytest.fixture(scope="session")
def runs(backend, backend_name, tmp_path_factory):
    """A run of two processes, and its whole folder."""
    words = ["train", "-c", "moco_v3/digits", "--backend", backend_name]
    words += ["-o", *SMALL, *AXES["pipeline"], "train.steps=24", "checkpoint.every=0"]
    campaign = Campaign(backend_name, words, tmp_path_factory.mktemp(backend_name))
    campaign.whole(campaign.folder / "whole", "launch-whole")
    return campaign


def ctrl_c(launch: Launch) -> None:
    """What a terminal does: the launcher and its process group get SIGINT."""
    os.killpg(launch.launcher.pid, signal.SIGINT)


def sigterm(launch: Launch) -> None:
    """What a scheduler does."""
    launch.launcher.send_signal(signal.SIGTERM)


@pytest.mark.parallel
@pytest.mark.parametrize("stop", [ctrl_c, sigterm])
def test_a_signal_to_the_launcher_saves_and_ends_all_processes(runs, tmp_path, stop):
    run_dir = tmp_path / "run"
    launch = Launch(runs.backend, 2, [*runs.words, "--output", str(run_dir)], tmp_path / "launch")
    try:
        wait_until(lambda: last_step(run_dir) >= 2 or launch.gone())
        stop(launch)
        assert launch.finish(rank_kills.GONE) != 0
    finally:
        launch.kill()
    assert launch.errors() == []
    assert "saving after this step" in launch.said()
    assert 2 <= rank_kills.saved_step(run_dir) == last_step(run_dir) < 24, launch.said()
    runs.whole(run_dir, f"launch-{stop.__name__}")
    assert compare(runs.folder / "whole", run_dir) == []


# ------------------------------------------------------------------------ the campaign itself


def test_a_campaign_kills_either_process_at_every_moment():
    kills = rank_kills.planned(random.Random(f"{SEED} data"), 60, 10)
    assert sorted(kill.moment for kill in kills) == sorted(MOMENTS)
    assert {kill.rank for kill in kills} == {kill.workers for kill in kills} == {0, 1}
    assert kills == rank_kills.planned(random.Random(f"{SEED} data"), 60, 10)
    assert [kill.step for kill in kills] == sorted({kill.step for kill in kills})


@pytest.mark.parametrize(
    ("moment", "status", "errors", "saved", "wrong"),
    [
        ("step", 1, 1, 10, ""),
        ("start", 1, 0, 10, ""),
        ("step", 1, 0, 10, "0 lines of error"),
        ("start", 1, 2, 10, "2 lines of error"),
        ("step", 0, 1, 10, "exit status is 0"),
        ("save", 1, 1, 9, "step 10 was saved, now 9"),
    ],
)
def test_a_campaign_sees_what_a_kill_may_not_do(moment, status, errors, saved, wrong):
    launch = SimpleNamespace(
        launcher=SimpleNamespace(returncode=status),
        errors=lambda: ["error: process 1 of 2 has ended"] * errors,
        said=lambda: "",
    )
    problems = rank_kills.judged(launch, Kill(moment, 10, 1, 0.5, 0), 10, saved)
    assert len(problems) == bool(wrong) and wrong in "".join(problems)


MAIN = """
import os, sys
if "1" in (os.environ.get("RANK"), os.environ.get("PADDLE_TRAINER_ID")):
    sys.path.insert(0, {other!r})
from triptych.core.cli import main
sys.exit(main())
"""
"""The command line, of which the second process has other sources."""


@pytest.mark.parallel
def test_a_process_with_other_sources_is_refused_by_name(backend, backend_name, tmp_path):
    """One comment more in the backend's package."""
    core = Path(triptych.core.__path__[0]).resolve()
    for package in ("core", "backends", "configs"):
        shutil.copytree(core.with_name(package), tmp_path / "other" / "triptych" / package)
    changed = tmp_path / "other" / "triptych" / "backends" / backend_name / "engine.py"
    changed.write_text(changed.read_text() + "# changed\n")
    words = ["train", "-c", "moco_v3/digits", "--backend", backend_name]
    words += ["--output", str(tmp_path / "run"), "-o", *SMALL, *AXES["data"]]
    main = MAIN.format(other=str(tmp_path / "other"))
    launch = Launch(backend_name, 2, words, tmp_path / "launch", main)
    try:
        assert launch.finish(120.0) != 0
    finally:
        launch.kill()
    (error,) = launch.errors()
    assert error.startswith("error: the 2 processes differ in version of the program; start all")
    assert not (tmp_path / "run").exists()


STORM = """
import os, signal, threading, time
from triptych.core import config
from triptych.core.launch import join
from triptych.core.machine.signals import heeded

ranks = join(config.load("moco_v3/digits", ["parallel.data=2", "device=cpu"]), {backend!r})
taken = []
for number in heeded():
    signal.signal(number, lambda number, frame: taken.append(number))

def send():
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.0005)

threading.Thread(target=send, daemon=True).start()
highest = [ranks.largest(step + ranks.rank) for step in range(300)]
assert highest == list(range(1, 301)), highest
assert len(taken) > 10, taken
ranks.close()
os._exit(0)
"""
"""A process that gets signals all the time while it waits for the other one."""


@pytest.mark.parallel
def test_signals_interrupt_no_waiting(backend, backend_name, tmp_path):
    launch = Launch(backend_name, 2, [], tmp_path / "launch", STORM.format(backend=backend_name))
    try:
        assert launch.finish(100.0) == 0, launch.said()
    finally:
        launch.kill()
