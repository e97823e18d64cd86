"""The Paddle backend."""

import os
from collections.abc import Mapping, Sequence

from triptych.backends.paddle import runtime

runtime.load()

import paddle  # noqa: E402

from triptych.backends.paddle.engine import Engine  # noqa: E402
from triptych.core.config.spec import RunSpec  # noqa: E402
from triptych.core.contracts import Array  # noqa: E402
from triptych.core.machine.devices import (  # noqa: E402
    check_precision,
    compute_stamp,
    pick_device,
)
from triptych.core.machine.failures import device_failures  # noqa: E402
from triptych.core.machine.resources import cpu_threads  # noqa: E402

# On the CPU autocast to bfloat16 stays float32 without a word, and float16 sums overflow.
PRECISIONS = {"cpu": ("float32", "float64"), "cuda": ("float32", "float64", "tf32")}
CUDA_11_CODE = (60, 61, 70, 75, 80, 86)
"""Architectures of paddlepaddle-gpu 2.6.2, the newest on PyPI: newer cards are not served."""


def versions() -> dict[str, str]:
    """Versions and settings that can change a number."""
    kernels = os.environ.get("MKL_DEBUG_CPU_TYPE", "unset")
    return {"paddle": paddle.__version__, "MKL_DEBUG_CPU_TYPE": kernels}


def cuda_devices() -> int:
    """CUDA devices the framework can use."""
    return paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0


def cuda_code() -> tuple[str, ...]:
    """What the build was compiled for, see ``core.machine.cuda.runs_on``."""
    if not paddle.is_compiled_with_cuda():
        return ()
    # Paddle 2.6 does not know it.
    archs: Sequence[int] = getattr(paddle.version, "cuda_archs", tuple)()
    return tuple(f"sm_{arch}" for arch in archs or CUDA_11_CODE)


def compute(spec: RunSpec) -> dict[str, str]:
    """What a run computes on and how: what can change a number, besides ``versions``.

    Raises:
        UserError: as ``build``.
    """
    libraries = {"cuda": paddle.version.cuda(), "cudnn": paddle.version.cudnn()}
    # Only convolutions are known to repeat, not gathers and their gradients.
    return compute_stamp(spec, device_of(spec), libraries, repeats=False)


def device_of(spec: RunSpec) -> str:
    """The device of a run; UserError where it or the precision is not to be had here."""
    device = pick_device(spec, "paddle", cuda_devices(), cuda_code())
    check_precision(spec, "paddle", device, PRECISIONS)
    return device


def _choose_kernels(spec: RunSpec, device: str) -> None:
    """Tells the framework which kernels may serve: their precision, and whether they repeat."""
    paddle.base.core.set_num_threads(cpu_threads(spec))
    # Before the device, whose handles take what is set by then. Paddle has TF32 on.
    for library in ("cublas", "cudnn"):
        switch = getattr(paddle.base.core, f"set_{library}_switch", None)
        if switch is not None:
            switch(spec.precision == "tf32")
    paddle.set_device(device.replace("cuda", "gpu"))
    if device != "cpu":
        paddle.set_flags({"FLAGS_cudnn_deterministic": spec.deterministic})


def build(spec: RunSpec, state: Mapping[str, Array]) -> Engine:
    """An engine whose model holds ``state``; the optimizer is fresh.

    Args:
        state: every tensor of ``core.parameters.table(spec)``.

    Raises:
        UserError: a device or precision that is not to be had here.
    """
    device = device_of(spec)
    _choose_kernels(spec, device)
    with device_failures(Engine.failures, spec, device):
        return Engine(spec, state, device)
