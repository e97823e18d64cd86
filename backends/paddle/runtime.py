"""Loads Paddle. Its package imports this module before anything that imports ``paddle``."""

import ctypes
import importlib
import os
import platform
import signal
import threading
import warnings
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's ``mallopt``."""


def load() -> None:
    """Imports ``paddle``: without noise, its matrix products and its memory at full speed."""
    use_fast_kernels()
    keep_memory()
    handler = signal.getsignal(signal.SIGTERM)
    threads = os.environ.get("OMP_NUM_THREADS")
    # Paddle sets it to 1, and warns where it is anything else; ``build`` tells it the number.
    os.environ["OMP_NUM_THREADS"] = "1"
    with warnings.catch_warnings():
        # A missing ccache concerns nobody who compiles no extension.
        warnings.simplefilter("ignore")
        importlib.import_module("paddle")
    del os.environ["OMP_NUM_THREADS"]
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = threads
    # Paddle takes SIGTERM for itself, to print a trace and end.
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def use_fast_kernels() -> None:
    """Makes Paddle's MKL, which is old, use AVX2 on AMD's processors too: 2 to 4 times faster.

    To be done before the first matrix product. The last bits of a run depend on it.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text():
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")


def keep_memory() -> None:
    """Makes the C library keep freed memory for the next tensor.

    Paddle has no cache of its own on the CPU. Without this, memory of large tensors goes back to
    the kernel and returns page fault by page fault, which takes longer than the arithmetic on it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # Older versions take at most 32 MiB.
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
