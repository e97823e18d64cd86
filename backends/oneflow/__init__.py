"""The OneFlow backend."""

from collections.abc import Mapping

from triptych.backends.oneflow import runtime

runtime.load()  # before the imports below import oneflow

import oneflow as flow  # noqa: E402

from triptych.backends.oneflow import products, threads  # noqa: E402
from triptych.backends.oneflow.engine import Engine  # noqa: E402
from triptych.backends.oneflow.parallel import join as join  # noqa: E402 - for core.launch
from triptych.core.config.spec import RunSpec  # noqa: E402
from triptych.core.contracts import ALONE, Array, Ranks  # noqa: E402
from triptych.core.machine.blas import VARIABLE  # noqa: E402
from triptych.core.machine.devices import (  # noqa: E402
    check_precision,
    compiles,
    compute_stamp,
    pick_device,
)
from triptych.core.machine.failures import device_failures  # noqa: E402
from triptych.core.machine.resources import cpu_threads  # noqa: E402

# OneFlow has no bfloat16 and no float16 arithmetic on the CPU.
PRECISIONS = {"cpu": ("float32", "float64"), "cuda": ("float32", "float64", "tf32")}
CUDA_CODE = ("sm_60", "sm_61", "sm_70", "sm_75", "sm_80", "sm_86")
"""Architectures of the machine code in the wheel of OneFlow 0.9.0.

The wheel holds no PTX, so the driver cannot compile kernels for a newer card. A kernel that is
started on a newer card ends the process.
"""


def versions() -> dict[str, str]:
    """The versions and settings that can change the numbers of a run, by name."""
    return {
        "oneflow": flow.__version__,
        VARIABLE: runtime.blas_kernels() or "unset",
        "float32 products": "NumPy" if products.serve() else "default",
    }


def cuda_devices() -> int:
    """The number of CUDA devices that the framework sees."""
    return int(flow.cuda.device_count())


def cuda_code() -> tuple[str, ...]:
    """The GPU architectures of the framework's build (see ``core.machine.cuda.runs_on``)."""
    return CUDA_CODE


def compute(spec: RunSpec) -> dict[str, str]:
    """The device, libraries and settings that can change a run's numbers, besides ``versions``.

    Raises:
        UserError: as in ``device_of``.
    """
    # The wheel's libraries. OneFlow has no switch for deterministic kernels.
    libraries = {"cuda": "11", "cudnn": "8"}
    return compute_stamp(spec, device_of(spec), libraries, repeats=False)


def device_of(spec: RunSpec) -> str:
    """The device of a run, "cpu" or "cuda:N".

    Raises:
        UserError: this machine or the backend lacks the device, the precision or a compiler.
    """
    # Devices are counted first: a CUDA device that does not exist would end the process.
    device = pick_device(spec, "oneflow", cuda_devices(), cuda_code())
    check_precision(spec, "oneflow", device, PRECISIONS)
    compiles(spec, "oneflow", device, able=False)
    return device


def build(spec: RunSpec, state: Mapping[str, Array], ranks: Ranks = ALONE) -> Engine:
    """Builds an engine whose model holds a copy of ``state``. The optimizer is fresh.

    OneFlow computes in one thread of its own. What NumPy computes takes ``spec.threads``; those of
    its matrix products were set before (see ``core.launch``).

    Args:
        state: every tensor of ``core.parameters.table(spec)``.
        ranks: the processes that train together, as ``join`` gives them.

    Raises:
        UserError: as in ``device_of``.
    """
    device = device_of(spec)
    threads.set_count(cpu_threads(spec))
    with device_failures(Engine.failures, spec, device):
        return Engine(spec, state, device, ranks)
