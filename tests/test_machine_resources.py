"""What a run may use of the machine."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from triptych.core.machine import resources
from triptych.core.machine.environment import memory_bytes


def test_free_memory_is_part_of_the_memory():
    assert 0 < resources.free_memory() <= memory_bytes()


@pytest.mark.parametrize(("limit", "free"), [("5000", 1700), ("max", 4096), ("3000", 0)])
def test_free_memory_of_a_container(tmp_path: Path, monkeypatch, limit, free):
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:  4 kB\nHugePages_Total:  0\n")
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("3700\n")
    (tmp_path / "memory.stat").write_text("anon 3000\nactive_file 300\ninactive_file 100\n")
    monkeypatch.setattr(resources, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(resources, "CONTROL_GROUP", tmp_path)
    assert resources.free_memory() == free


def test_the_peak_of_a_process_is_not_that_of_its_parent():
    large = np.ones(40 << 20, np.uint8)
    code = "from triptych.core.machine import resources; print(resources.peak_memory_mib())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = resources.peak_memory_mib()
    assert 5 < float(done.stdout) < own - 20 and own > large.nbytes / 2**20


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model name\t: A Chip: 9\nflags : fpu avx2 avx512f\n", "A Chip: 9 (avx2, avx512f)"),
        ("Features : neon\n", f"{platform.machine()} (no vector units known)"),
    ],
)
def test_the_name_of_the_processor_says_its_units(monkeypatch, tmp_path, text, name):
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    monkeypatch.setattr(resources, "CPUINFO", file)
    assert resources.processor_name() == name
