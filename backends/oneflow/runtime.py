"""Loads OneFlow. Its package imports this module before anything that imports ``oneflow``."""

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Loaded before OPENBLAS_CORETYPE is set for OneFlow, since NumPy's own OpenBLAS reads it too.
import numpy  # noqa: F401

from triptych.core.errors import UserError
from triptych.core.machine.resources import keep_memory, processor

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
PACKAGES = {
    "cublas": "nvidia-cublas-cu11==11.11.3.6",
    "cudnn": "nvidia-cudnn-cu11==8.6.0.163",
}

BLAS_VARIABLE = "OPENBLAS_CORETYPE"


def load() -> None:
    """Imports ``oneflow``: without noise, its matrix products at full speed.

    Raises:
        UserError: a CUDA library is missing.
    """
    for package, library in LIBRARIES:
        load_library(package, library)
    # OneFlow keeps the memory of its tensors itself; this is for what NumPy computes for it.
    keep_memory()
    # Without a GPU its start would print a warning about the driver.
    os.environ.setdefault("GLOG_minloglevel", "3")
    with fast_kernels():
        importlib.import_module("oneflow")


def load_library(package: str, library: str) -> None:
    """Loads one library of ``nvidia-<package>-cu11``, or of the system.

    Raises:
        UserError: it is in neither.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = (spec and spec.submodule_search_locations) or ()
    files = [Path(folder, package, "lib", library) for folder in folders]
    try:
        # For OneFlow only: under a global name it would also serve the other frameworks here.
        ctypes.CDLL(next((str(file) for file in files if file.is_file()), library))
    except OSError as error:
        raise UserError(
            f"backend 'oneflow': the CUDA build of OneFlow needs {library}, also on a machine "
            f"without a GPU ({error}); run: pip install {PACKAGES[package]}"
        ) from error


@contextmanager
def fast_kernels() -> Iterator[None]:
    """OneFlow loaded inside gets the matrix products of ``blas_kernels``."""
    before, kernels = os.environ.get(BLAS_VARIABLE), blas_kernels()
    if kernels is not None:
        os.environ[BLAS_VARIABLE] = kernels
    try:
        yield
    finally:
        # NumPy in a child process has an OpenBLAS of its own, which knows better.
        if before is None:
            os.environ.pop(BLAS_VARIABLE, None)


def blas_kernels() -> str | None:
    """What OneFlow's OpenBLAS is told to use: what the user says, else AVX2 where there is AVX2.

    It is older than many processors and gives one that it does not know kernels of 2007, at less
    than half the speed. The last bits of a run depend on it.
    """
    avx2 = processor() >= {"avx2", "fma"}
    return os.environ.get(BLAS_VARIABLE) or ("Haswell" if avx2 else None)
