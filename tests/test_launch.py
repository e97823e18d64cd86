"""How a run comes to its engine: backend, threads, launchers, a state that fits."""

import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
from support.double import install, tiny
from threadpoolctl import threadpool_info

from triptych import backends
from triptych.core import launch
from triptych.core.contracts import ALONE
from triptych.core.errors import UserError
from triptych.core.machine import launchers, resources
from triptych.core.machine.launchers import COMMON, PADDLE, TORCHRUN, Launched, launched
from triptych.core.parallel.agreement import together
from triptych.core.parameters import initial_state


@pytest.fixture(autouse=True)
def numpy_backend(monkeypatch):
    install(monkeypatch)


# ------------------------------------------------------------------------------------- launchers


@pytest.mark.parametrize("variables", [COMMON, PADDLE])
def test_a_command_of_one_process_refuses_several_and_the_first_says_why(monkeypatch, variables):
    monkeypatch.setenv(variables.world, "1")
    launch.refuse_launchers()
    monkeypatch.setenv(variables.world, "2")
    for number, told in (
        ("0", f"{variables.world}=2: this command runs in one process"),
        ("1", ""),
    ):
        monkeypatch.setenv(variables.rank, number)
        with pytest.raises(UserError) as caught:
            launch.refuse_launchers()
        assert str(caught.value).partition(";")[0] == told


@pytest.mark.parametrize(
    ("count", "number", "told"),
    [
        ("x", "1", "WORLD_SIZE=x: expected a number"),
        ("2", "x", "RANK=x: expected a number"),
        ("2", "7", "RANK=7: WORLD_SIZE is 2"),
    ],
)
def test_variables_that_no_launcher_has_set_are_refused(monkeypatch, count, number, told):
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.setenv("RANK", number)
    with pytest.raises(UserError, match=told):
        launched()


def test_a_process_knows_its_place(monkeypatch):
    assert launched() == Launched()
    for name, value in (("WORLD_SIZE", "04"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert launched() == Launched(3, 4, 1, 4, COMMON)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launched() == Launched(3, 4, 1, 2, COMMON)


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(resources, "cores", lambda: 9)
    assert resources.cpu_threads(tiny("threads=auto")) == 9
    for world, threads in (("2", 4), ("12", 1)):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert resources.cpu_threads(tiny("threads=auto")) == threads
    assert resources.cpu_threads(tiny("threads=3")) == 3


@pytest.mark.parametrize(
    ("name", "variables", "told"),
    [
        ("torch", {"PADDLE_TRAINERS_NUM": "2"}, "by paddle.distributed.launch; start .*torchrun"),
        ("paddle", {"WORLD_SIZE": "2"}, "by torchrun or oneflow.*paddle.distributed.launch"),
        ("oneflow", {"WORLD_SIZE": "2", TORCHRUN: "a"}, "by torchrun; start .*oneflow.distributed"),
    ],
)
def test_the_launcher_of_another_framework_is_refused(monkeypatch, name, variables, told):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=f"backend {name}: the 2 processes were started {told}"):
        launch.join(tiny(), name)


def test_one_process_joins_none_and_a_wrong_number_is_refused(monkeypatch):
    assert launch.join(tiny(), "torch") is ALONE
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"data 1 x tensor 1 .* = 1, but .* is 3"):
        launch.join(tiny(), "torch")


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
ENDPOINTS = {"PADDLE_TRAINER_ENDPOINTS": "h:1,h:2"}


@pytest.mark.parametrize(
    ("backend", "variables", "said"),
    [
        ("torch", {"MASTER_ADDR": ""}, "^MASTER_ADDR: not set, for 2 processes; start"),
        ("oneflow", {"MASTER_PORT": ""}, "^MASTER_PORT=: expected the number of a port; start"),
        ("torch", {"MASTER_PORT": "abc"}, "^MASTER_PORT=abc: expected the number of a port; start"),
        ("torch", {"MASTER_PORT": "70000"}, "^MASTER_PORT=70000: expected the number"),
        ("paddle", {"PADDLE_TRAINER_ENDPOINTS": ""}, "^PADDLE_TRAINER_ENDPOINTS=: expected host"),
        ("paddle", {"PADDLE_TRAINER_ENDPOINTS": "h:1"}, "=h:1: expected host:port of each of 2"),
        ("paddle", {"PADDLE_TRAINER_ENDPOINTS": "h:1,2"}, "=h:1,2: expected host:port of each"),
        ("paddle", {"PADDLE_MASTER": "h"}, "^PADDLE_MASTER=h: expected host:port; start"),
    ],
)
def test_processes_that_do_not_know_where_to_meet_say_so(monkeypatch, backend, variables, said):
    world = "PADDLE_TRAINERS_NUM" if backend == "paddle" else "WORLD_SIZE"
    given = ENDPOINTS if backend == "paddle" else MEETING
    for name, value in {world: "2", **given, **variables}.items():
        monkeypatch.setenv(name, value)
    spec = tiny("parallel.data=2")
    monkeypatch.setattr(launch, "load", lambda *_: pytest.fail("the processes meet"))
    with pytest.raises(UserError, match=said):
        launch.join(spec, backend)


def test_a_process_that_waits_long_says_for_whom(monkeypatch, capsys):
    def join(spec):
        time.sleep(0.3)
        return ALONE

    module = SimpleNamespace(join=join)
    monkeypatch.setattr(launch, "load", lambda *_: module)
    monkeypatch.setattr(launch, "LONG", 0.05)
    for name, value in {"WORLD_SIZE": "2", **MEETING}.items():
        monkeypatch.setenv(name, value)
    spec = tiny("parallel.data=2")
    assert launch.join(spec, "torch") is ALONE
    said = "waiting for all 2 processes to meet (MASTER_ADDR=127.0.0.1, MASTER_PORT=1)\n"
    assert capsys.readouterr().err == said
    monkeypatch.setenv("LOCAL_RANK", "1")
    launch.join(spec, "torch")
    monkeypatch.setattr(launch, "LONG", 60.0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    launch.join(spec, "torch")
    assert capsys.readouterr().err == ""


def test_an_error_before_the_processes_meet_is_told_once_on_a_machine(monkeypatch):
    waited = []
    monkeypatch.setattr(launchers.time, "sleep", waited.append)
    for number in ("0", "1"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", number)
        with pytest.raises(UserError, match="no such recipe"), launchers.once_per_machine():
            raise UserError("no such recipe")
    assert waited == [launchers.PATIENCE]  # in which the launcher ends the second process


def test_one_process_is_together_with_itself():
    with together(ALONE):
        pass
    error = UserError("photo.jpg: damaged")
    with pytest.raises(UserError) as caught, together(ALONE):
        raise error
    assert caught.value is error


# ---------------------------------------------------------------------------- backend and threads


def test_the_choice_of_a_backend(monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda: ("oneflow", "paddle"))
    said = []
    assert launch.choose_backend("torch", tiny("backend=paddle")) == "torch"
    assert launch.choose_backend(None, tiny("backend=paddle")) == "paddle"
    assert launch.choose_backend(None, tiny(), said.append) == "oneflow"
    assert said == ["backend: oneflow, the first installed"]
    monkeypatch.setattr(backends, "installed", lambda: ())
    with pytest.raises(UserError, match="pip install"):
        launch.choose_backend(None, tiny())


def test_threads_are_set_before_a_framework_is_imported(monkeypatch):
    found = []
    monkeypatch.setattr(backends, "load", lambda name: found.append(os.environ["OMP_NUM_THREADS"]))
    for threads in (2, 1):
        launch.load(tiny(f"threads={threads}"), "torch")
        # OpenCV brings an OpenBLAS that was built without threads.
        pools = [p for p in threadpool_info() if p["user_api"] == "blas"]
        pools = [pool for pool in pools if pool["threading_layer"] != "disabled"]
        assert pools and {pool["num_threads"] for pool in pools} == {threads}
    assert found == ["2", "1"]


# -------------------------------------------------------------------------------------- the engine


def whole_state(spec):
    engine = launch.open_engine(spec, launch.REFERENCE, initial_state(spec))
    return {name: np.array(array) + 1 for name, array in engine.export_state().items()}


def test_an_engine_takes_the_model_or_the_whole_of_a_state():
    spec = tiny()
    state = whole_state(spec)
    fresh = launch.open_engine(spec, "torch", state).export_state()
    resumed = launch.open_engine(spec, "torch", state, whole=True).export_state()
    assert fresh.keys() == resumed.keys() == state.keys()
    moments = [name for name in state if name.startswith("optimizer.")]
    assert moments and not any(fresh[name].any() for name in moments)
    assert all(np.array_equal(resumed[name], state[name]) for name in state)
    assert all(np.array_equal(fresh[name], state[name]) for name in state.keys() - set(moments))


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("student.predictor.0.weight", None, "missing student.predictor.0.weight (12, 8)"),
        ("student.predictor.0.weight", (2, 3), "student.predictor.0.weight: expected (12, 8), got"),
        ("optimizer.step", None, "missing optimizer.step ()"),
        ("optimizer.other", (2,), "unused optimizer.other (2,)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_the_name_of_its_file(name, change, problem):
    spec = tiny()
    state = whole_state(spec)
    if change is None:
        del state[name]
    else:
        state[name] = np.zeros(change)
    with pytest.raises(UserError) as caught:
        launch.open_engine(spec, "torch", state, whole=True, origin="run/step-00000004")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"run/step-00000004: {problem}")
