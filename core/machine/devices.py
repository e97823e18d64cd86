"""On which device a run computes, and in which precision. Refusals are by name."""

import functools
import os
import re
import sys
from collections.abc import Collection, Mapping

from triptych.core.config.spec import RunSpec
from triptych.core.errors import UserError
from triptych.core.machine import cuda

DEVICE_VARIABLE = "TRIPTYCH_DEVICE"
"""Takes the place of ``device: auto``, and names the device of tests, demo and parity."""

TF32_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "ONEFLOW_EP_CUDA_ENABLE_TF32_EXECUTION")
"""Of cuBLAS and cuDNN, and of OneFlow, which has TF32 on without it: "0" is off, "1" on."""
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"
"""Eight buffers of 4 MiB: cuBLAS then adds in one order each time (cuBLAS, "Reproducibility")."""


def prepare_libraries(precision: str | None = None) -> None:
    """Sets the environment that CUDA's libraries read once, to be done before a framework's import.

    Args:
        precision: of the run; None: what has been set stays, and TF32 is off where nothing was.
    """
    for name in TF32_VARIABLES:
        if precision is None:
            os.environ.setdefault(name, "0")
        else:
            os.environ[name] = "1" if precision == "tf32" else "0"
    os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACE)


def wanted_device(spec: RunSpec, otherwise: str = "auto") -> str:
    """The device that a run asks for: the spec's, unless that is "auto".

    Args:
        otherwise: of a spec that says "auto", where ``TRIPTYCH_DEVICE`` says nothing either.

    Returns:
        "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: ``TRIPTYCH_DEVICE`` is none of these.
    """
    if spec.device != "auto":
        return spec.device
    named = os.environ.get(DEVICE_VARIABLE) or otherwise
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", named):
        raise UserError(f"{DEVICE_VARIABLE}={named}: expected auto, cpu, cuda or cuda:N")
    return named


def on_compared_device(spec: RunSpec) -> RunSpec:
    """The spec for a comparison of frameworks: on the CPU, unless a device is named.

    The device is named by the spec or by ``TRIPTYCH_DEVICE``. One framework on a GPU beside another
    on the CPU would compare devices.
    """
    return spec.model_copy(update={"device": wanted_device(spec, otherwise="cpu")})


def pick_device(spec: RunSpec, backend: str, cuda_devices: int, code: Collection[str]) -> str:
    """The device of this process, "cpu" or "cuda:N".

    "auto" is the first card that the framework sees and has code for. Where there are only others,
    a line on stderr says so, and the CPU is taken.

    Args:
        cuda_devices: how many the framework can see.
        code: what its build was compiled for (see ``core.machine.cuda.runs_on``).

    Raises:
        UserError: the spec names a device that is not there, or that the framework has no code for.
    """
    wanted = wanted_device(spec)
    if wanted == "cpu" or (wanted == "auto" and not cuda_devices):
        return "cpu"
    if wanted != "auto":
        number = int(wanted.partition(":")[2] or 0)
        if number >= cuda_devices:
            raise UserError(
                f"device: {wanted!r}, but {backend} sees {cuda_devices} CUDA devices here; "
                "use auto or cpu"
            )
        if problem := why_not(number, backend, code):
            raise UserError(f"device: {wanted!r}, but {problem}; use device=cpu")
        return f"cuda:{number}"
    problems = [why_not(number, backend, code) for number in range(cuda_devices)]
    if "" in problems:
        return f"cuda:{problems.index('')}"
    _warn(f"device: auto takes the CPU, since {problems[0]}")
    return "cpu"


def why_not(number: int, backend: str, code: Collection[str]) -> str:
    """Why a framework cannot compute on the card ``number``; empty where it can."""
    cards = cuda.cards()
    if number >= len(cards):
        return f"the driver ({cuda.LIBRARY}) does not say what cuda:{number} is"
    if cuda.runs_on(cards[number].capability, code):
        return ""
    known = ", ".join(code) or "no card"
    return f"this build of {backend} has no code for {cards[number]}, only for {known}"


@functools.cache
def _warn(line: str) -> None:
    """Once in a process, however many engines are built."""
    print(f"warning: {line}", file=sys.stderr)


def check_precision(
    spec: RunSpec, backend: str, device: str, supported: Mapping[str, Collection[str]]
) -> None:
    """Raises UserError where the backend cannot compute in the spec's precision on the device.

    On a GPU that is also where the process was begun for another precision: TF32 is chosen once,
    before the framework is imported.

    Args:
        supported: device kind ("cpu", "cuda") -> precisions.
    """
    kind = device.partition(":")[0]
    if spec.precision not in supported[kind]:
        raise UserError(
            f"precision: {backend} has no {spec.precision} on {kind}; "
            f"use {' or '.join(supported[kind])}"
        )
    wanted = "1" if spec.precision == "tf32" else "0"
    wrong = [name for name in TF32_VARIABLES if os.environ.get(name) != wanted]
    if kind == "cuda" and wrong:
        raise UserError(
            f"precision: {spec.precision} needs {wrong[0]}={wanted} before {backend} is imported, "
            f"and it is {os.environ.get(wrong[0], 'not set')}; start another process"
        )


def compute_stamp(
    spec: RunSpec, device: str, libraries: Mapping[str, object], *, repeats: bool
) -> dict[str, str]:
    """What a run computes on and how, as noted in its checkpoints.

    Args:
        libraries: name -> version of what CUDA brings: "cuda", "cudnn".
        repeats: whether the backend takes only kernels that give the same bits each time.
    """
    if device == "cpu":
        return {"device": "cpu"}
    return {
        "device": cuda.cards()[int(device.partition(":")[2])].name,
        **{name: str(version) for name, version in libraries.items()},
        "tf32": "on" if spec.precision == "tf32" else "off",
        "deterministic": "yes" if repeats else "no",
    }
