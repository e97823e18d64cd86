"""Two machines, as two network namespaces that a pair of virtual cards joins.

The kernel gives them to root only. Without that the test says why it is left out.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = (
    *("data.workers=0", "threads=1", "precision=float64", "log.tensorboard=false"),
    *("train.batch_size=16", "train.steps=3", "optim.warmup_steps=1", "log.every=1"),
    *("evaluate.every=0", "checkpoint.every=0"),
)
TRAIN = ["tools/train.py", "-c", "moco_v3/digits", "--backend", "torch"]
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """The names of two namespaces that reach each other at ``ADDRESSES``."""
    names = [f"triptych{os.getpid()}{letter}" for letter in "ab"]
    cards = [f"trip{os.getpid() % 10**7}{letter}" for letter in "ab"]
    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", cards[0], "type", "veth", "peer", "name", cards[1])
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '') or error}")
        for name, card, address in zip(names, cards, ADDRESSES, strict=True):
            ip("link", "set", card, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", card)
            for each in (card, "lo"):
                ip("-n", name, "link", "set", each, "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def started(name: str, number: int, output: Path) -> subprocess.Popen[str]:
    """Starts torchrun on one of the nodes."""
    card = f"trip{os.getpid() % 10**7}{'ab'[number]}"
    launcher = ["--nnodes", "2", "--node_rank", str(number), "--nproc_per_node", "1"]
    meeting = ["--master_addr", ADDRESSES[0], "--master_port", "29500"]
    inside = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
    train = [*TRAIN, "--output", str(output), "-o", *SPEC, "parallel.data=2"]
    return subprocess.Popen(
        [*inside, *launcher, *meeting, *train],
        cwd=ROOT,
        env={**os.environ, "GLOO_SOCKET_IFNAME": card},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parallel
def test_two_nodes_train_what_one_process_does(nodes, tmp_path):
    pytest.importorskip("torch")
    running = [started(name, i, tmp_path / "two") for i, name in enumerate(nodes)]
    said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert "done after step 3 of 3" in said[0] and "done after" not in said[1]
    command = [sys.executable, *TRAIN, "--output", str(tmp_path / "one"), "-o", *SPEC]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    two, one = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("two", "one"))
    assert two["last_loss"] == pytest.approx(one["last_loss"], rel=1e-10)
