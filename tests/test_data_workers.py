"""Worker processes: nothing is left behind, however a run ends."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.data_specs import folder_spec, write_images

from triptych.core.data import DamagedImage, Pipeline, open_train, workers
from triptych.core.data.jobs import Filled
from triptych.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="the processes of this system are not in /proc"
)


def workers_of(parent: int | None = None) -> list[int]:
    """Worker processes that live (and are no zombies), of one parent or of anyone."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            state, mother = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        of_ours = b"triptych.core.data.worker" in command and state != "Z"
        if of_ours and parent in (None, int(mother)):
            found.append(int(folder.name))
    return found


def zombies() -> list[str]:
    """Ended children that nobody has waited for."""
    stats = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    found = []
    for child in " ".join(stats).split():
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        found += [child] if state == "Z" else []
    return found


def until(condition, seconds: float = 20.0) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def resources() -> tuple[int, list[str]]:
    """Open files of this process, and named shared memory of the machine that looks like ours."""
    gc.collect()  # what earlier tests left behind would close its files at any later moment
    shared = Path("/dev/shm")
    names = sorted(p.name for p in shared.iterdir()) if shared.exists() else []
    return len(os.listdir("/proc/self/fd")), [n for n in names if "triptych" in n or "psm_" in n]


@pytest.fixture
def pipeline(tmp_path: Path):
    write_images(tmp_path, [f"{number}.png" for number in range(12)])
    spec = folder_spec(tmp_path, workers=2)
    before = resources()
    with Pipeline(spec, open_train(spec)) as opened:
        yield opened
    assert not workers_of(os.getpid()) and not zombies()
    assert resources() == before


def test_workers_end_with_the_last_batch(pipeline):
    assert len(list(pipeline.batches(0, 5))) == 5
    assert not workers_of(os.getpid()) and not zombies()


def test_workers_end_when_the_iterator_is_dropped(pipeline):
    for _ in pipeline.batches(0, 100):
        assert len(workers_of(os.getpid())) == 2
        break
    assert not workers_of(os.getpid()) and not zombies()


def test_close_ends_what_is_still_in_use(pipeline):
    loading = pipeline.batches(0, 100)
    next(loading)
    pipeline.close()
    assert not workers_of(os.getpid()) and not zombies()
    with pytest.raises(StopIteration):
        next(loading)


def test_an_error_in_the_loop_ends_the_workers(pipeline):
    with pytest.raises(ZeroDivisionError), pipeline:
        for _ in pipeline.batches(0, 100):
            raise ZeroDivisionError
    assert not workers_of(os.getpid()) and not zombies()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_an_error_not_a_wait(pipeline, how):
    loading = pipeline.batches(0, 1000)
    next(loading)
    os.kill(workers_of(os.getpid())[0], how)
    with pytest.raises(UserError, match=rf"worker process \d+ was killed by {how.name}"):
        for _ in loading:
            pass


class Broken:
    """A source with a bug."""

    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return 10

    def image(self, index: int) -> None:
        raise ZeroDivisionError("a bug")


def test_a_bug_in_a_worker_shows_its_traceback(tmp_path, capfd):
    with Pipeline(folder_spec(tmp_path, workers=1), Broken()) as pipeline:
        with pytest.raises(UserError, match="stopped with status 1; its own message is above"):
            next(pipeline.batches(0, 1))
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err


# ------------------------------------------------------------------- what goes through the pipe

MEGABYTE = 2**20
"""More than any pipe holds."""


class Numbers:
    """A job whose batches hold their own number, and whose replies have a size to choose."""

    shape = (1,)

    def __init__(self, size: int) -> None:
        self.size = size

    def fill(self, number: int, out: np.ndarray) -> Filled:
        out[:] = number % 256
        return Filled(np.full(self.size // 8, number))


class Failing:
    """A job that names a file with a very long name."""

    shape = (1,)

    def fill(self, number: int, out: np.ndarray) -> Filled:
        raise DamagedImage("x" * MEGABYTE)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """A wait without an end becomes an error."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("team", "prefetch", "size", "count"),
    [(1, 1000, 8, 3000), (2, 10**9, 8, 700), (1, 3, MEGABYTE, 30), (2, 1, 8, 7)],
)
def test_no_number_and_no_size_of_messages_can_block(team, prefetch, size, count):
    def finish(planes: np.ndarray, filled: Filled) -> tuple[int, int]:
        return int(planes[0]), int(filled.index[-1])

    with time_limit(60):
        loaded = list(workers.load(Numbers(size), range(5, 5 + count), team, prefetch, finish))
    assert loaded == [(number % 256, number) for number in range(5, 5 + count)]


def test_an_error_keeps_its_type_and_all_of_its_message():
    with time_limit(60), pytest.raises(DamagedImage, match=f"^x{{{MEGABYTE}}}$"):
        next(workers.load(Failing(), range(1000), 1, 1000, lambda planes, filled: None))


@pytest.mark.parametrize(("free", "slots"), [(10**9, 50), (80, 20), (13, 3), (0, 1)])
def test_batches_kept_ready_fill_half_of_the_free_memory_at_most(monkeypatch, free, slots):
    monkeypatch.setattr(workers, "free_memory", lambda: free)
    with ExitStack() as stack:
        team = workers._team(stack, Numbers(8), workers=2, prefetch=50, batches=10**6)
        assert [len(worker.planes) for worker in team] == [slots, slots]


def test_workers_import_no_framework_and_little_else():
    heavy = ("torch", "torchvision", "oneflow", "paddle", "timm", "sklearn", "scipy", "tensorboard")
    script = (
        f"import triptych.core.data.worker, sys; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# ------------------------------------------------------------------------- how a parent can end

# No "if __name__": a worker must not run the user's script a second time.
SCRIPT = """
import signal, sys
sys.path.insert(0, {tests!r})
from support.data_specs import folder_spec
from triptych.core.data import Pipeline, open_train
print("script", flush=True)
stopping = False
def stop(number, frame):
    global stopping
    stopping = True
signal.signal(signal.SIGTERM, stop)
spec = folder_spec({root!r}, workers=2)
with Pipeline(spec, open_train(spec)) as pipeline:
    left = 5
    for step, batch in enumerate(pipeline.batches(0, 10**9)):
        if step == 3:
            print("running", flush=True)
        left -= stopping
        if not left:
            break
print("done", flush=True)
"""


@pytest.fixture
def running(tmp_path: Path):
    """A process group whose leader trains with two workers."""
    root = tmp_path / "images"
    write_images(root, [f"{number}.png" for number in range(12)])
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(tests=str(ROOT / "tests"), root=str(root)))
    process = subprocess.Popen(
        [sys.executable, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    team: list[int] = []
    try:
        assert process.stdout is not None
        assert [process.stdout.readline(), process.stdout.readline()] == ["script\n", "running\n"]
        team = workers_of(process.pid)
        assert len(team) == 2
        yield process, team
    finally:
        process.kill()
        for worker in set(team) & set(workers_of()):  # only where a test has failed
            os.kill(worker, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_ends_all_with_one_traceback(running):
    process, team = running
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=30)
    assert until(lambda: not set(team) & set(workers_of()))
    assert err.count("KeyboardInterrupt") == 1 and err.count("Traceback") == 1
    assert "script" not in out and "Warning" not in err


def test_sigterm_to_all_lets_the_parent_finish(running):
    process, team = running
    os.killpg(process.pid, signal.SIGTERM)  # as a cluster's scheduler does
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "done\n", "")
    assert not set(team) & set(workers_of())


def test_a_killed_parent_takes_its_workers_along(running):
    process, team = running
    process.kill()
    _, err = process.communicate(timeout=30)
    assert until(lambda: not set(team) & set(workers_of()))
    assert err == ""


def test_workers_that_are_stuck_go_too(running, tmp_path):
    process, team = running
    for path in (tmp_path / "images").iterdir():  # like files on a dead disk: reading never ends
        path.unlink()
        os.mkfifo(path)
    time.sleep(1)
    process.kill()
    process.wait(timeout=30)
    assert until(lambda: not set(team) & set(workers_of()))
