"""Loads Paddle. Its package imports this module before anything that imports ``paddle``."""

import importlib
import os
import signal
import threading
import warnings

from triptych.core.machine.resources import keep_memory, processor


def load() -> None:
    """Imports ``paddle``: without noise, its matrix products and its memory at full speed."""
    use_fast_kernels()
    # Paddle has no cache of its own on the CPU.
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
    if "AuthenticAMD" in processor():
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
