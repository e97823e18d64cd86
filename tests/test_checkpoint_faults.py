"""Writers that are killed, and disks that are full: what was saved before stays whole."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_checkpoint_store import make_spec, make_state, newest, same, save, steps

from triptych.core import checkpoint
from triptych.core.errors import UserError

# ------------------------------------------------------------------------------- sudden deaths


def dies(action: Callable[[], object], at: int) -> bool:
    """Runs ``action`` in a fork that is killed at its ``at``-th step on the file system.

    Returns:
        Whether it came to that; otherwise the action ended well.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if event == "open" or event.startswith(("os.", "shutil.")):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(3, id="a new step"),
        pytest.param(2, marks=pytest.mark.soak, id="a step saved before"),
    ],
)
def test_a_writer_may_die_at_every_operation(tmp_path: Path, step: int) -> None:
    """Old or new, whole, and nothing half-written is even looked at."""
    found = set()
    for at in range(1, 1000):
        run = tmp_path / str(at)
        save(run, 1)
        checkpoint.write(run, 2, make_state(20), make_spec(), {}, keep=2)
        died = dies(lambda: save(run, step, keep=2), at)  # noqa: B023 - called at once
        path, messages = newest(run)
        assert path is not None and not messages
        for visible in (run / "checkpoints").glob("step-*"):
            checkpoint.verify(visible)
        manifest, state = checkpoint.read(path)
        old, new = same(state, make_state(20)), same(state, make_state(step))
        assert (old and manifest.step == 2) or (new and manifest.step == step)
        found.add("new" if new else "old")
        save(run, 4, keep=2)
        assert len(steps(run)) == 2 and newest(run)[0].name == "step-00000004"
        shutil.rmtree(run)
        if not died:
            break
    assert at > 20, "the operations were not seen"
    assert found == {"old", "new"}


WRITER = """
import sys
from pathlib import Path
from test_checkpoint_store import make_state, save
run, step = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    step += 1
    save(run, step, keep=2)
"""


def test_a_writer_may_be_killed_at_any_time(tmp_path: Path) -> None:
    rng = random.Random(0)
    step = 0
    for _ in range(6):
        path = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(step)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.4))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        found, messages = newest(tmp_path)
        assert not messages
        if found is not None:
            manifest, state = checkpoint.read(found)
            assert same(state, make_state(manifest.step)) and manifest.step >= step
            step = manifest.step
    assert step > 6


# ------------------------------------------------------------------------------------ full disks


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may grow beyond 100 bytes; no fixture, since pytest's own report may be a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_refused(run: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        save(run, 2, keep=1)
    assert "\n" not in str(caught.value) and str(run / "checkpoints/step-00000002") in str(
        caught.value
    )
    assert os.listdir(run / "checkpoints") == ["step-00000001"]
    assert same(checkpoint.read(run / "checkpoints/step-00000001")[1], make_state(1))


def test_a_disk_that_is_full_for_arrays(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with small_disk():
        check_refused(tmp_path, "File too large.*free some space.*checkpoint.keep")


@pytest.mark.parametrize("nth", range(1, 8))
def test_a_disk_that_fills_up_at_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    save(tmp_path, 1)
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    check_refused(tmp_path, "No space left on device; free some space")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=r"cannot save .*; make the folder writable"):
        save(tmp_path, 2)
