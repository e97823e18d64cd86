"""What of the machine a run uses: threads, device, precision. Refusals are by name."""

import os
from collections.abc import Collection, Mapping

from triptych.core.config.spec import RunSpec
from triptych.core.errors import UserError


def cpu_threads(spec: RunSpec) -> int:
    """Threads of the framework: the spec's, or for "auto" the cores this process may use."""
    return len(os.sched_getaffinity(0)) if spec.threads == "auto" else spec.threads


def pick_device(spec: RunSpec, backend: str, cuda_devices: int) -> str:
    """The device of this process, "cpu" or "cuda:N".

    Args:
        cuda_devices: how many the framework can see.

    Raises:
        UserError: the spec names a device that is not there.
    """
    if spec.device == "cpu" or (spec.device == "auto" and not cuda_devices):
        return "cpu"
    number = int(spec.device.partition(":")[2] or 0)
    if number >= cuda_devices:
        raise UserError(
            f"device: {spec.device!r}, but {backend} sees {cuda_devices} CUDA devices here; "
            "use auto or cpu"
        )
    return f"cuda:{number}"


def check_precision(
    spec: RunSpec, backend: str, device: str, supported: Mapping[str, Collection[str]]
) -> None:
    """Raises UserError where the backend cannot compute in the spec's precision on the device.

    Args:
        supported: device kind ("cpu", "cuda") -> precisions.
    """
    kind = device.partition(":")[0]
    if spec.precision not in supported[kind]:
        raise UserError(
            f"precision: {backend} has no {spec.precision} on {kind}; "
            f"use {' or '.join(supported[kind])}"
        )
