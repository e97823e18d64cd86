"""Tells NumPy's OpenBLAS which kernels to take, before NumPy is imported.

OpenBLAS knows the processors of its own time. On a newer one it takes kernels for SSE, with a fifth
of the speed or less, and on AMD's processors with AVX-512 it takes those for AVX2.
"""

import os
import sys
from pathlib import Path

VARIABLE = "OPENBLAS_CORETYPE"
"""The variable that OpenBLAS reads when it is loaded. The user's own choice stays."""
CPUINFO = Path("/proc/cpuinfo")
AVX512 = frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"})
"""The flags of a processor that can run the kernels for AVX-512."""
KERNELS = "SkylakeX"
"""OpenBLAS's name of these kernels."""


def choose_kernels() -> None:
    """Has OpenBLAS take the kernels for AVX-512 if the processor can run them.

    Child processes inherit the choice. It changes the last digits of a run's numbers.
    """
    if "numpy" not in sys.modules and CPUINFO.is_file():
        if AVX512 <= set(CPUINFO.read_text().split()):
            os.environ.setdefault(VARIABLE, KERNELS)
