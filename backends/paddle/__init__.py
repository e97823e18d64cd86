"""The Paddle backend."""

import os
from collections.abc import Mapping, Sequence

from triptych.backends.paddle import runtime

runtime.load()

import paddle  # noqa: E402

from triptych.backends.paddle.engine import Engine  # noqa: E402
from triptych.backends.paddle.parallel import join as join  # noqa: E402 - for core.launch
from triptych.core.config.spec import RunSpec  # noqa: E402
from triptych.core.contracts import ALONE, Array, Ranks  # noqa: E402
from triptych.core.errors import UserError  # noqa: E402
from triptych.core.machine import cuda  # noqa: E402
from triptych.core.machine.devices import (  # noqa: E402
    check_precision,
    compiles,
    compute_stamp,
    pick_device,
)
from triptych.core.machine.failures import device_failures  # noqa: E402
from triptych.core.machine.resources import cpu_threads  # noqa: E402

# On the CPU, autocast to bfloat16 silently computes in float32, and float16 sums overflow.
PRECISIONS = {"cpu": ("float32", "float64"), "cuda": ("float32", "float64", "tf32", "bfloat16")}
BFLOAT16_CAPABILITY = (8, 0)
"""Of a card that computes in bfloat16. On others, autocast silently computes in float32."""
CUDA_11_CODE = (60, 61, 70, 75, 80, 86)
"""Architectures of paddlepaddle-gpu 2.6.2, the newest on PyPI. It lacks code for newer cards."""


def versions() -> dict[str, str]:
    """The versions and settings that can change the numbers of a run, by name."""
    kernels = os.environ.get("MKL_DEBUG_CPU_TYPE", "unset")
    return {"paddle": paddle.__version__, "MKL_DEBUG_CPU_TYPE": kernels}


def cuda_devices() -> int:
    """The number of CUDA devices that the framework sees."""
    return paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0


def cuda_code() -> tuple[str, ...]:
    """The GPU architectures of the framework's build (see ``core.machine.cuda.runs_on``)."""
    if not paddle.is_compiled_with_cuda():
        return ()
    # Paddle 2.6 lacks ``cuda_archs``.
    archs: Sequence[int] = getattr(paddle.version, "cuda_archs", tuple)()
    return tuple(f"sm_{arch}" for arch in archs or CUDA_11_CODE)


def compute(spec: RunSpec) -> dict[str, str]:
    """The device, libraries and settings that can change a run's numbers, besides ``versions``.

    Raises:
        UserError: as in ``device_of``.
    """
    libraries = {"cuda": paddle.version.cuda(), "cudnn": paddle.version.cudnn()}
    # Convolutions are known to be deterministic, but not gathers and their gradients.
    return compute_stamp(spec, device_of(spec), libraries, repeats=False)


def device_of(spec: RunSpec) -> str:
    """The device of a run, "cpu" or "cuda:N".

    Raises:
        UserError: this machine or the backend lacks the device, the precision or a compiler.
    """
    device = pick_device(spec, "paddle", cuda_devices(), cuda_code())
    check_precision(spec, "paddle", device, PRECISIONS)
    if spec.precision == "bfloat16":
        _check_bfloat16(device)
    compiles(spec, "paddle", device, able=False)
    return device


def _check_bfloat16(device: str) -> None:
    card = cuda.cards()[int(device.partition(":")[2])]
    if card.capability < BFLOAT16_CAPABILITY:
        raise UserError(f"precision: paddle has no bfloat16 on {card}; use float32")


def _choose_kernels(spec: RunSpec, device: str) -> None:
    """Sets the precision of the framework's kernels, and whether they must be deterministic."""
    paddle.base.core.set_num_threads(cpu_threads(spec))
    # Paddle has TF32 on. It is set before the device, whose handles copy the setting.
    for library in ("cublas", "cudnn"):
        switch = getattr(paddle.base.core, f"set_{library}_switch", None)
        if switch is not None:
            switch(spec.precision == "tf32")
    paddle.set_device(device.replace("cuda", "gpu"))
    if device != "cpu":
        paddle.set_flags({"FLAGS_cudnn_deterministic": spec.deterministic})


def build(spec: RunSpec, state: Mapping[str, Array], ranks: Ranks = ALONE) -> Engine:
    """Builds an engine whose model holds a copy of ``state``. The optimizer is fresh.

    Args:
        state: every tensor of ``core.parameters.table(spec)``.
        ranks: the processes that train together, as ``join`` gives them.

    Raises:
        UserError: as in ``device_of``.
    """
    device = device_of(spec)
    _choose_kernels(spec, device)
    with device_failures(Engine.failures, spec, device):
        return Engine(spec, state, device, ranks)
