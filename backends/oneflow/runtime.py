"""Loads OneFlow. Its package imports this module before anything that imports ``oneflow``."""

import ctypes
import importlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# NumPy is imported before OPENBLAS_CORETYPE is set for OneFlow: NumPy's OpenBLAS reads it, too.
import numpy  # noqa: F401

from triptych.core.errors import UserError
from triptych.core.machine.blas import VARIABLE
from triptych.core.machine.launchers import launched
from triptych.core.machine.lifeline import follow_launcher
from triptych.core.machine.resources import keep_memory, processor

# OneFlow's wheel is a CUDA build. It needs these libraries in this order, even without a GPU. It
# finds them by itself only if pip has put both packages into the same folder.
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


def load() -> None:
    """Imports ``oneflow`` without its warnings and with fast matrix products.

    Raises:
        UserError: a CUDA library is missing, or the port is taken at which processes meet.
    """
    for package, library in LIBRARIES:
        load_library(package, library)
    place = launched()
    if place.world > 1:
        # The import waits for the other processes, which may have failed before.
        follow_launcher()
    if place.world > 1 and place.rank == 0:
        check_port(os.environ["MASTER_PORT"])
    # OneFlow keeps the memory of its tensors itself. This is for the arrays of ``kernels``.
    keep_memory()
    # Without a GPU, OneFlow would print a warning about the driver.
    os.environ.setdefault("GLOG_minloglevel", "3")
    with fast_kernels():
        importlib.import_module("oneflow")


def check_port(text: str) -> None:
    """Raises UserError if another program listens at the port. The import would end the process."""
    try:
        socket.create_server(("", int(text))).close()
    except OSError as error:
        raise UserError(
            f"MASTER_PORT={text}: {error.strerror}; give the launcher another --master_port"
        ) from error


def load_library(package: str, library: str) -> None:
    """Loads one library of ``nvidia-<package>-cu11``, or of the system.

    Raises:
        UserError: the library is in neither.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    files = [Path(folder, package, "lib", library) for folder in folders or ()]
    try:
        # Not RTLD_GLOBAL: the other frameworks of this process must not find the library.
        ctypes.CDLL(next((str(file) for file in files if file.is_file()), library))
    except OSError as error:
        raise UserError(
            f"backend 'oneflow': the CUDA build of OneFlow needs {library}, also on a machine "
            f"without a GPU ({error}); run: pip install {PACKAGES[package]}"
        ) from error


@contextmanager
def fast_kernels() -> Iterator[None]:
    """If OneFlow is imported in the block, its matrix products use ``blas_kernels``."""
    before, kernels = os.environ.get(VARIABLE), blas_kernels()
    if kernels is not None:
        os.environ[VARIABLE] = kernels
    try:
        yield
    finally:
        # Child processes must not inherit it: NumPy's OpenBLAS makes a better choice by itself.
        if before is None:
            os.environ.pop(VARIABLE, None)


def blas_kernels() -> str | None:
    """The kernels for OneFlow's OpenBLAS: the user's choice, else AVX2 if the processor has it.

    OneFlow's OpenBLAS is older than many processors. For a processor that it does not know it uses
    kernels of 2007, which have less than half the speed. The choice changes the last bits of a
    run's numbers.
    """
    avx2 = processor() >= {"avx2", "fma"}
    return os.environ.get(VARIABLE) or ("Haswell" if avx2 else None)
