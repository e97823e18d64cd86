"""Turns a framework's exceptions about memory and kernels into errors of one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from triptych.core.config.spec import RunSpec
from triptych.core.errors import DeviceError

OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|Fail to alloc memory|ResourceExhausted|ALLOC_FAILED", re.I
)
NO_CODE = re.compile("no kernel image|PTX was compiled with an unsupported toolchain", re.I)
NOT_REPEATABLE = re.compile("does not have a deterministic implementation", re.I)
NO_COMPILER = re.compile("working triton installation|No working C\\+\\+|find C compiler", re.I)
COMPILER_ENDED = re.compile("CppCompileError", re.I)
"""Words of PyTorch, Triton, OneFlow, Paddle, cuBLAS and cuDNN in messages of their exceptions."""


@contextmanager
def device_failures(
    kinds: tuple[type[Exception], ...], spec: RunSpec, device: str
) -> Iterator[None]:
    """Raises an error with a remedy for a framework's exception that is not a bug.

    Args:
        kinds: types of the framework's exceptions for too little memory or a missing kernel.
        device: the run's device, "cpu" or "cuda:N".

    Raises:
        DeviceError: replaces such an exception. Other exceptions pass unchanged.
    """
    try:
        yield
    except kinds as error:
        reason = _reason(str(error), spec, device)
        if reason is None:
            raise
        raise DeviceError(reason) from error


def _reason(text: str, spec: RunSpec, device: str) -> str | None:
    on_gpu = device != "cpu"
    if OUT_OF_MEMORY.search(text):
        size = spec.train.batch_size
        remedies = [f"train.batch_size={size // 2}"] if size > 3 else []
        remedies += ["device=cpu"] if on_gpu else []
        remedy = " or ".join(remedies) or "a smaller model"
        return f"device: {device} has not enough memory for train.batch_size {size}; use {remedy}"
    if NO_CODE.search(text):
        return f"device: {device}: the framework has no code for this card; use device=cpu"
    if NOT_REPEATABLE.search(text):
        first = text.partition(" does not have")[0]
        return f"deterministic: {first} has no such kernel on {device}; use deterministic=false"
    if NO_COMPILER.search(text):
        return f"train.compile: no compiler for {device} works here; use train.compile=false"
    if COMPILER_ENDED.search(text):
        # A signal to all processes of the run ends the compiler, too.
        return (
            "train.compile: the compiler failed or was ended; use train.compile=false or try again"
        )
    return None
