"""Loads OneFlow. Its package imports this module before anything that imports ``oneflow``."""

import ctypes
import importlib
import importlib.util
import os
from pathlib import Path

# NumPy first: its own OpenBLAS reads the same OPENBLAS_CORETYPE, which is set below for OneFlow's.
import numpy  # noqa: F401

from triptych.core.errors import UserError

# The wheel is a CUDA build: it needs these even on a machine without a GPU, in this order, and
# finds them by itself only where pip put both packages into the same folder.
LIBRARIES = (
    ("cublas", "libcublasLt.so.11"),
    ("cublas", "libcublas.so.11"),
    ("cudnn", "libcudnn_ops_infer.so.8"),
    ("cudnn", "libcudnn_ops_train.so.8"),
    ("cudnn", "libcudnn_cnn_infer.so.8"),
    ("cudnn", "libcudnn_cnn_train.so.8"),
    ("cudnn", "libcudnn.so.8"),
)


def load() -> None:
    """Imports ``oneflow``, its libraries before it and its matrix product at full speed.

    Raises:
        UserError: a CUDA library is missing.
    """
    for package, library in LIBRARIES:
        load_library(package, library)
    # Without a GPU its start would print a warning about the driver.
    os.environ.setdefault("GLOG_minloglevel", "3")
    blas = None if "OPENBLAS_CORETYPE" in os.environ else blas_kernels()
    if blas is None:
        importlib.import_module("oneflow")
        return
    os.environ["OPENBLAS_CORETYPE"] = blas
    try:
        importlib.import_module("oneflow")
    finally:
        del os.environ["OPENBLAS_CORETYPE"]


def load_library(package: str, library: str) -> None:
    """Loads one library of a CUDA package, from ``nvidia-<package>-cu11`` or the system.

    Raises:
        UserError: it is in neither.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = (spec and spec.submodule_search_locations) or ()
    files = [Path(folder, package, "lib", library) for folder in folders]
    try:
        ctypes.CDLL(next((str(file) for file in files if file.is_file()), library))
    except OSError as error:
        raise UserError(
            f"backend 'oneflow': {library} does not load ({error}); "
            f"run: pip install 'nvidia-{package}-cu11{VERSIONS[package]}'"
        ) from error


VERSIONS = {"cublas": "==11.11.3.6", "cudnn": "==8.6.0.163"}


def blas_kernels() -> str | None:
    """The kernels that OneFlow's OpenBLAS should use; None: those it chooses.

    It is older than most processors: one that it does not know gets kernels of 2007, without AVX,
    at less than half the speed.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return None
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    flags = next(lines, "").split()
    return "Haswell" if {"avx2", "fma"} <= set(flags) else None
