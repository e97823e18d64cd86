"""The Paddle backend."""

import os
from collections.abc import Mapping

from triptych.backends.paddle import runtime

runtime.load()

import paddle  # noqa: E402

from triptych.backends.paddle.engine import Engine  # noqa: E402
from triptych.core.config.spec import RunSpec  # noqa: E402
from triptych.core.contracts import Array  # noqa: E402
from triptych.core.machine.devices import check_precision, pick_device  # noqa: E402
from triptych.core.machine.resources import cpu_threads  # noqa: E402

# On the CPU autocast to bfloat16 stays float32 without a word, and float16 sums overflow.
PRECISIONS = {"cpu": ("float32", "float64"), "cuda": ("float32", "float64")}
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
    archs = getattr(paddle.version, "cuda_archs", tuple)()
    return tuple(f"sm_{arch}" for arch in archs or CUDA_11_CODE)


def build(spec: RunSpec, state: Mapping[str, Array]) -> Engine:
    """An engine whose model holds ``state``; the optimizer is fresh.

    Args:
        state: every tensor of ``core.parameters.table(spec)``.

    Raises:
        UserError: a device or precision that is not to be had here.
    """
    device = pick_device(spec, "paddle", cuda_devices(), cuda_code())
    check_precision(spec, "paddle", device, PRECISIONS)
    paddle.base.core.set_num_threads(cpu_threads(spec))
    paddle.set_device(device.replace("cuda", "gpu"))
    if device != "cpu":
        # Parity first: TF32 keeps ten bits of a float32's fraction, and cuDNN may pick kernels
        # that add in another order each time.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        paddle.set_flags({"FLAGS_cudnn_deterministic": True})
    return Engine(spec, state, device)
