"""Loads Paddle. Its package imports this module before anything that imports ``paddle``."""

import importlib
import os
import signal
import threading
import warnings

from triptych.core.machine.blas import AVX512
from triptych.core.machine.resources import keep_memory, processor

AVX2_KERNELS, AVX512_KERNELS = "5", "7"
"""Names that MKL has for the kernels of Intel's Haswell and Skylake-X (``MKL_DEBUG_CPU_TYPE``)."""


def load() -> None:
    """Imports ``paddle`` without its warnings, with fast matrix products and reuse of memory."""
    use_fast_kernels()
    # Its library reports each connection of processes on stderr.
    os.environ.setdefault("GLOG_minloglevel", "2")
    # Paddle keeps no freed memory on the CPU.
    keep_memory()
    handler = signal.getsignal(signal.SIGTERM)
    threads = os.environ.get("OMP_NUM_THREADS")
    # Paddle sets this to 1 and warns about other values. ``build`` sets the number of threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    with warnings.catch_warnings():
        # Paddle warns if ccache is missing, which only those need who compile extensions.
        warnings.simplefilter("ignore")
        importlib.import_module("paddle")
    del os.environ["OMP_NUM_THREADS"]
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = threads
    # Paddle replaces the handler of SIGTERM: its own prints a trace and ends the process.
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def use_fast_kernels() -> None:
    """Makes Paddle's MKL, which is old, use the vector units of AMD's processors, too.

    With AVX2 its products are 2 to 4 times as fast, with AVX-512 up to twice as fast again. Call
    this before the first matrix product. It changes the last bits of a run's numbers.
    """
    if "AuthenticAMD" in processor():
        kernels = AVX512_KERNELS if processor() >= AVX512 else AVX2_KERNELS
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", kernels)
