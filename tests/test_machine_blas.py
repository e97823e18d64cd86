"""Which kernels NumPy's OpenBLAS is asked for: before it is loaded, and never against the user."""

import os
import subprocess
import sys

import pytest

from triptych.core.machine import blas

AVX512 = "flags : fpu avx2 " + " ".join(sorted(blas.AVX512))


@pytest.mark.parametrize(
    ("flags", "loaded", "given", "chosen"),
    [
        (AVX512, False, None, "SkylakeX"),
        (AVX512, False, "Haswell", "Haswell"),
        (AVX512, True, None, None),
        (AVX512.replace(" avx512vl", ""), False, None, None),
        ("flags : fpu avx2", False, None, None),
        (None, False, None, None),
    ],
)
def test_the_choice(monkeypatch, tmp_path, flags, loaded, given, chosen):
    file = tmp_path / "cpuinfo"
    if flags:
        file.write_text(flags)
    monkeypatch.setattr(blas, "CPUINFO", file)
    monkeypatch.setattr(blas.sys, "modules", {"numpy": None} if loaded else {})
    monkeypatch.delenv(blas.VARIABLE, raising=False)
    if given:
        monkeypatch.setenv(blas.VARIABLE, given)
    blas.choose_kernels()
    assert os.environ.get(blas.VARIABLE) == chosen


SAY = """
import sys
{load}
from threadpoolctl import threadpool_info
print({{library["architecture"] for library in threadpool_info()}})
"""


@pytest.mark.parametrize(
    "load",
    [
        "from triptych.core.cli import main; main(['info', '--help'])",
        "from triptych.core import list_models",
    ],
)
def test_command_line_and_interface_choose_before_numpy_is_loaded(load):
    """Without the choice, the outcome is OpenBLAS's own."""
    if not (blas.CPUINFO.is_file() and set(blas.CPUINFO.read_text().split()) >= blas.AVX512):
        pytest.skip("this processor has no AVX-512")
    environment = {k: v for k, v in os.environ.items() if k != blas.VARIABLE}
    load = f"try:\n    {load}\nexcept SystemExit:\n    pass"
    command = [sys.executable, "-c", SAY.format(load=load)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1:] == ["{'SkylakeX'}"], done.stderr
