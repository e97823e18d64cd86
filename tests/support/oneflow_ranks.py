"""Starts OneFlow's launcher, and collects what it has left."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("oneflow_worker.py")
LAUNCHER = "oneflow.distributed.launch"
HANG = 150.0
"""Seconds after which the processes count as hanging."""


def free_port() -> int:
    """A port that no process listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(count: int, *words: object) -> subprocess.Popen[str]:
    """Starts a Python program in ``count`` processes.

    The launcher ends its whole process group if one of them ends badly, so it has a group of its
    own.
    """
    path = [str(TESTS), os.environ.get("PYTHONPATH")]
    command = [sys.executable, "-m", LAUNCHER, "--nproc_per_node", count]
    command += ["--master_port", free_port(), *words]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        },
    )


def finish(process: subprocess.Popen[str], within: float = HANG) -> tuple[int, str, str]:
    """Exit status, standard output and errors of a launcher. Nothing of its group outlives it."""
    try:
        out, err = process.communicate(timeout=within)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    return process.returncode, out, err
