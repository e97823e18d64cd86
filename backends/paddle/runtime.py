"""Loads Paddle. Its package imports this module before anything that imports ``paddle``."""

import ctypes
import importlib
import os
import platform
import warnings
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's ``mallopt``."""


def load() -> None:
    """Imports ``paddle`` without its noise, its matrix product and its memory at full speed."""
    use_fast_kernels()
    keep_memory()
    with warnings.catch_warnings():
        # A missing ccache concerns nobody who compiles no extension.
        warnings.simplefilter("ignore")
        paddle = importlib.import_module("paddle")
    # Its own handlers would take SIGTERM away from the training loop.
    paddle.disable_signal_handler()


def use_fast_kernels() -> None:
    """Makes Paddle's old MKL use AVX2 on processors that are not Intel's: 2 to 4 times faster.

    Before the first matrix product. The bits of a run depend on it, so ``versions`` records it.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text():
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")


def keep_memory() -> None:
    """Makes the C library keep freed memory for the next tensor.

    Paddle has no cache of its own on the CPU. As it is, every tensor above 128 KiB comes fresh
    from the kernel, page fault by page fault, which costs more than most of the arithmetic.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # Older versions accept at most 32 MiB here.
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
