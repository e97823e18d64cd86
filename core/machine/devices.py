"""Chooses the device and checks the precision of a run. Errors name what is refused."""

import functools
import os
import re
import sys
from collections.abc import Collection, Mapping

from triptych.core.config.spec import DEVICES, RunSpec
from triptych.core.errors import UserError
from triptych.core.machine import cuda
from triptych.core.machine.launchers import launched

DEVICE_VARIABLE = "TRIPTYCH_DEVICE"
"""Overrides ``device: auto``. Tests, demo and parity take their device from it, too."""

TF32_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "ONEFLOW_EP_CUDA_ENABLE_TF32_EXECUTION")
"""Variables for TF32, "0" for off and "1" for on: of cuBLAS and cuDNN, and of OneFlow.

OneFlow has TF32 on by default.
"""
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"
"""Eight buffers of 4 MiB. With these cuBLAS always adds in one order (its "Reproducibility")."""


def prepare_libraries(precision: str | None = None) -> None:
    """Sets the variables that CUDA's libraries read once. Call it before a framework is imported.

    Args:
        precision: the run's precision; None: variables that are set stay, and TF32 is off by
            default.
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
        otherwise: the device if the spec says "auto" and ``TRIPTYCH_DEVICE`` is not set.

    Returns:
        "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: ``TRIPTYCH_DEVICE`` is none of these.
    """
    if spec.device != "auto":
        return spec.device
    named = os.environ.get(DEVICE_VARIABLE) or otherwise
    if not re.fullmatch(DEVICES, named):
        raise UserError(f"{DEVICE_VARIABLE}={named}: expected auto, cpu, cuda or cuda:N")
    return named


def on_compared_device(spec: RunSpec) -> RunSpec:
    """The spec for a comparison of frameworks: on the CPU, unless a device is named.

    The spec or ``TRIPTYCH_DEVICE`` may name the device. All frameworks get the same device:
    otherwise the comparison would be one of devices.
    """
    return spec.model_copy(update={"device": wanted_device(spec, otherwise="cpu")})


def pick_device(spec: RunSpec, backend: str, cuda_devices: int, code: Collection[str]) -> str:
    """The device of this process, "cpu" or "cuda:N".

    "auto" is the first card that the framework sees and has code for. If it sees cards but has
    code for none of them, "auto" is the CPU, and a line on stderr says so. Of several processes on
    a machine each has the card of its number, for "auto" and "cuda".

    Args:
        cuda_devices: number of cards that the framework sees.
        code: what its build was compiled for (see ``core.machine.cuda.runs_on``).

    Raises:
        UserError: the named device does not exist, or the framework has no code for it.
    """
    wanted = wanted_device(spec)
    named = f"device: {wanted!r}" if spec.device != "auto" else f"{DEVICE_VARIABLE}={wanted}"
    if wanted == "cpu" or (wanted == "auto" and not cuda_devices):
        return "cpu"
    place = launched()
    if place.world > 1 and wanted in ("auto", "cuda"):
        return _card_of(place.local_rank, backend, cuda_devices, code)
    if wanted != "auto":
        number = int(wanted.partition(":")[2] or 0)
        if number >= cuda_devices:
            raise UserError(
                f"{named}, but {backend} sees {cuda_devices} CUDA devices here; use auto or cpu"
            )
        if problem := why_not(number, backend, code):
            raise UserError(f"{named}, but {problem}; use device=cpu")
        return f"cuda:{number}"
    problems = [why_not(number, backend, code) for number in range(cuda_devices)]
    if "" in problems:
        return f"cuda:{problems.index('')}"
    _warn(f"device: auto takes the CPU, since {problems[0]}")
    return "cpu"


def _card_of(local_rank: int, backend: str, cuda_devices: int, code: Collection[str]) -> str:
    """The card of one of several processes of a machine; raises UserError if there is none."""
    if local_rank >= cuda_devices:
        raise UserError(
            f"device: process {local_rank} of this machine has no card, {backend} sees "
            f"{cuda_devices} CUDA devices here; start {cuda_devices} processes on it, or use cpu"
        )
    if problem := why_not(local_rank, backend, code):
        raise UserError(f"device: {problem}; use device=cpu")
    return f"cuda:{local_rank}"


def why_not(number: int, backend: str, code: Collection[str]) -> str:
    """Why a framework cannot compute on the card ``number``; empty if it can."""
    cards = cuda.cards()
    if number >= len(cards):
        return f"the driver ({cuda.LIBRARY}) does not say what cuda:{number} is"
    if cuda.runs_on(cards[number].capability, code):
        return ""
    known = ", ".join(code) or "no card"
    return f"this build of {backend} has no code for {cards[number]}, only for {known}"


@functools.cache
def _warn(line: str) -> None:
    """Prints a warning once in a process, even if several engines are built."""
    print(f"warning: {line}", file=sys.stderr)


def check_precision(
    spec: RunSpec, backend: str, device: str, supported: Mapping[str, Collection[str]]
) -> None:
    """Raises UserError if the backend cannot compute in the spec's precision on the device.

    On a GPU it also raises if the process was started for another precision: TF32 is chosen once,
    before the framework is imported.

    Args:
        supported: device kind ("cpu", "cuda") -> precisions.
    """
    kind = device.partition(":")[0]
    if spec.precision not in supported[kind]:
        elsewhere = any(spec.precision in precisions for precisions in supported.values())
        raise UserError(
            f"precision: {backend} has no {spec.precision}{f' on {kind}' if elsewhere else ''}; "
            f"use {' or '.join(supported[kind])}"
        )
    wanted = "1" if spec.precision == "tf32" else "0"
    wrong = [name for name in TF32_VARIABLES if os.environ.get(name) != wanted]
    if kind == "cuda" and wrong:
        raise UserError(
            f"precision: {spec.precision} needs {wrong[0]}={wanted} before {backend} is imported, "
            f"and it is {os.environ.get(wrong[0], 'not set')}; start another process"
        )


def compiles(spec: RunSpec, backend: str, device: str, *, able: bool) -> bool:
    """Whether the networks of a run are compiled (``train.compile``).

    Args:
        able: whether the framework has a compiler that serves.

    Raises:
        UserError: the spec asks for a compilation that cannot be.
    """
    wanted = spec.train.compile
    divided = [key for key in ("tensor", "pipeline") if getattr(spec.parallel, key) > 1]
    if wanted == "auto":
        return able and device != "cpu" and not divided
    if wanted and not able:
        raise UserError(f"train.compile: true: {backend} has no compiler; use auto, or torch")
    if wanted and divided:
        raise UserError(
            f"train.compile: true: with parallel.{divided[0]} processes meet within the networks, "
            "which are not compiled then; use auto"
        )
    return bool(wanted)


def compute_stamp(
    spec: RunSpec,
    device: str,
    libraries: Mapping[str, object],
    *,
    repeats: bool,
    compiled: bool = False,
) -> dict[str, str]:
    """The device, libraries and settings of a run, as stored in its checkpoints.

    Args:
        libraries: name -> version of CUDA's libraries: "cuda", "cudnn".
        repeats: whether the backend uses only kernels that always give the same bits.
        compiled: whether the networks are compiled.
    """
    networks = {"compiled": "yes" if compiled else "no"}
    if device == "cpu":
        return {"device": "cpu", **networks}
    return {
        "device": cuda.cards()[int(device.partition(":")[2])].name,
        **{name: str(version) for name, version in libraries.items()},
        "tf32": "on" if spec.precision == "tf32" else "off",
        "deterministic": "yes" if repeats else "no",
        **networks,
    }
