"""The OneFlow backend."""

from collections.abc import Mapping

from triptych.backends.oneflow import runtime

runtime.load()  # before anything below imports oneflow

import oneflow as flow  # noqa: E402

from triptych.backends.oneflow.engine import Engine  # noqa: E402
from triptych.core.config.spec import RunSpec  # noqa: E402
from triptych.core.contracts import Array  # noqa: E402
from triptych.core.machine.devices import (  # noqa: E402
    check_precision,
    compute_stamp,
    pick_device,
)
from triptych.core.machine.failures import device_failures  # noqa: E402

# OneFlow has no bfloat16 and no float16 arithmetic on the CPU.
PRECISIONS = {"cpu": ("float32", "float64"), "cuda": ("float32", "float64", "tf32")}
CUDA_CODE = ("sm_60", "sm_61", "sm_70", "sm_75", "sm_80", "sm_86")
"""Machine code in the wheel of OneFlow 0.9.0, which holds no PTX: the driver cannot compile it for
a newer card. A kernel that is started there ends the process."""


def versions() -> dict[str, str]:
    """Versions that can change a number."""
    kernels = runtime.blas_kernels() or "unset"
    return {"oneflow": flow.__version__, runtime.BLAS_VARIABLE: kernels}


def cuda_devices() -> int:
    """CUDA devices the framework can use."""
    return int(flow.cuda.device_count())


def cuda_code() -> tuple[str, ...]:
    """What the build was compiled for, see ``core.machine.cuda.runs_on``."""
    return CUDA_CODE


def compute(spec: RunSpec) -> dict[str, str]:
    """What a run computes on and how: what can change a number, besides ``versions``.

    Raises:
        UserError: as ``build``.
    """
    # Those that the wheel was built for; there is no switch for kernels that repeat.
    libraries = {"cuda": "11", "cudnn": "8"}
    return compute_stamp(spec, device_of(spec), libraries, repeats=False)


def device_of(spec: RunSpec) -> str:
    """The device of a run; UserError where it or the precision is not to be had here."""
    # The count comes first: to name a CUDA device that is not there ends the process.
    device = pick_device(spec, "oneflow", cuda_devices(), cuda_code())
    check_precision(spec, "oneflow", device, PRECISIONS)
    return device


def build(spec: RunSpec, state: Mapping[str, Array]) -> Engine:
    """An engine whose model holds ``state``; the optimizer is fresh.

    ``spec.threads`` changes nothing here: OneFlow computes in one thread of its own, and NumPy in
    as many as its environment said when it was loaded.

    Args:
        state: every tensor of ``core.parameters.table(spec)``.

    Raises:
        UserError: a device or precision that is not to be had here.
    """
    device = device_of(spec)
    with device_failures(Engine.failures, spec, device):
        return Engine(spec, state, device)
