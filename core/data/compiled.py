"""Machine code of ``kernels``: compiled once per machine, kept in the cache folder, loaded by need.

Numba takes ten seconds to compile, and one to load what it has compiled. So it compiles in another
process. A process that loads images links the result by llvmlite, in a tenth of a second.
"""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from triptych.core.errors import UserError
from triptych.core.files.caching import alone, cache_folder
from triptych.core.machine.environment import FAST
from triptych.core.machine.lifeline import follow_launcher

SIGNATURES = {
    "resize_weights": "LLLlli",
    "resize_across": "bLLliLLb",
    "resize_grey_across": "bLLliLLb",
    "resize_down": "bLLliLLLib",
    "blend": "bLFF",
    "luma_sum": "bLLl",
    "saturate": "bLF",
    "grey": "bL",
    "turn_hue": "bLL",
    "box_across": "bLLUUUb",
    "box_down": "bLLUUUb",
    "solarize": "bLL",
    "normalize": "bLFFf",
}
"""Name -> types of the arguments of a kernel.

- L: int64, U: uint32, F: float32
- b, i, l, f: pointer to uint8, int32, int64, float32
"""
WORTH = 2_000_000_000
"""Fewest bytes of views for which kernels are compiled; Pillow needs a minute for them."""
LATER = 10_000_000
"""Bytes of pixels that a process makes without kernels before it loads them.

Pillow needs half a second for them. Loading takes a tenth of one, so short jobs do without it.
"""
SCALARS = {"L": ctypes.c_int64, "U": ctypes.c_uint32, "F": ctypes.c_float}
_SIMPLE = "resize_across"
"""The kernel whose inner loop is as short as a filter: vectors hold the bytes of one pixel."""
_DIGEST = 32
_BUILD = """
import sys
sys.path[:] = sys.argv[1:]
from triptych.core.data.compiled import build
build()
"""


@dataclass(frozen=True)
class Kernels:
    """Functions of machine code, by name; arrays are given by their addresses.

    Attributes:
        engine: of llvmlite, which owns the memory of the code.
    """

    functions: dict[str, Callable[..., None]]
    engine: object

    def __getattr__(self, name: str) -> Callable[..., None]:
        return self.functions[name]


class _Later:
    """Loads the kernels once this process has made ``LATER`` bytes, and they are compiled."""

    def __init__(self) -> None:
        self._made, self._next = 0, LATER
        self._kernels: Kernels | None = None

    def kernels(self, size: int) -> Kernels | None:
        """See ``kernels``."""
        self._made += size
        if self._kernels is None and self._made > self._next:
            self._next = self._made + LATER
            self._kernels = load()
        return self._kernels


_later = _Later()


def kernels(size: int) -> Kernels | None:
    """The kernels, or None if they are not here or not worth loading yet.

    Args:
        size: number of bytes of pixels that are about to be made.
    """
    return _later.kernels(size)


def address(array: "NDArray[Any]") -> int:
    """Where the elements of an array are, for a kernel."""
    return array.ctypes.data


def available() -> bool:
    """Whether the packages of the extra ``fast`` are here."""
    return all(importlib.util.find_spec(name) for name in FAST)


def load() -> Kernels | None:
    """The kernels of this machine; None if they are not compiled or a package is missing."""
    if not available():
        return None
    try:
        content = _place().read_bytes()
    except OSError:
        return None
    code = content[_DIGEST:]
    # A damaged object would end the process.
    return _linked(code) if hashlib.sha256(code).digest() == content[:_DIGEST] else None


def build() -> None:
    """Compiles the kernels for this machine, unless that is done or the folder is read-only."""
    follow_launcher()
    place = _place()
    try:
        with alone(place, lambda: None):
            if load() is None:
                code = _compiled()
                part = place.with_suffix(".part")
                part.write_bytes(hashlib.sha256(code).digest() + code)
                part.replace(place)
    except (UserError, OSError):
        return  # images are made with Pillow


def builder() -> "subprocess.Popen[bytes]":
    """A process that does ``build``."""
    return subprocess.Popen(
        [sys.executable, "-c", _BUILD, *sys.path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextmanager
def building(count: int) -> Iterator[None]:
    """Compiles in the background while inside, where kernels are missing and can be had.

    Args:
        count: number of bytes of views that are about to be made. A few do not pay for it.
    """
    if count < WORTH or not available() or _place().exists():
        yield
        return
    process = builder()
    try:
        yield
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------------------------------- machine


@cache
def _llvm() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


@cache
def _place() -> Path:
    """The file of this machine: a processor, and versions of the compiler and of its input."""
    llvm = _llvm()
    source = Path(__file__).with_name("kernels.py").read_bytes()
    parts = (
        *(repr(SIGNATURES), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()),
        *(version("numba"), version("llvmlite"), sys.version, hashlib.sha256(source).hexdigest()),
    )
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / "kernels" / f"{digest}.o"


def _machine() -> Any:
    llvm = _llvm()
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(llvm.get_host_cpu_name(), features, opt=3, jit=True)


def _linked(code: bytes) -> Kernels:
    llvm = _llvm()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    functions: dict[str, Callable[..., None]] = {}
    for name, signature in SIGNATURES.items():
        types: list[Any] = [SCALARS.get(letter, ctypes.c_void_p) for letter in signature]
        functions[name] = ctypes.CFUNCTYPE(None, *types)(engine.get_function_address(name))
    return Kernels(functions, engine)


def _compiled() -> bytes:
    """An object file with all kernels.

    Numba only translates to LLVM's language. Its own optimiser would vectorise short loops, too.
    """
    settings = {"NUMBA_OPT": "0", "NUMBA_LOOP_VECTORIZE": "0", "NUMBA_SLP_VECTORIZE": "0"}
    os.environ.update(settings)
    from triptych.core.data.kernels import KERNELS

    llvm, machine = _llvm(), _machine()
    whole = llvm.parse_assembly("")
    for name, kernel in KERNELS.items():
        module = llvm.parse_assembly(kernel.inspect_llvm().replace(kernel.native_name, name))
        for function in module.functions:
            if not function.is_declaration and function.name != name:
                function.linkage = "internal"
                function.add_function_attribute("alwaysinline")
        options = llvm.create_pipeline_tuning_options(speed_level=3)
        options.slp_vectorization, options.loop_vectorization = True, name != _SIMPLE
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        whole.link_in(module)
    code: bytes = machine.emit_object(whole)
    return code
