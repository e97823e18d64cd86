"""The PyTorch backend."""

from collections.abc import Mapping

import torch

from triptych.backends.torch.engine import Engine
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array
from triptych.core.machine.devices import check_precision, compute_stamp, pick_device
from triptych.core.machine.failures import device_failures
from triptych.core.machine.resources import cpu_threads

# float16 needs loss scaling, which this version does not have.
PRECISIONS = {
    "cpu": ("float32", "float64", "bfloat16"),
    "cuda": ("float32", "float64", "tf32", "bfloat16"),
}


def versions() -> dict[str, str]:
    """Versions that can change a number."""
    import timm
    import torchvision

    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
    }


def cuda_devices() -> int:
    """CUDA devices the framework can use."""
    return torch.cuda.device_count()


def cuda_code() -> tuple[str, ...]:
    """What the build was compiled for, see ``core.machine.cuda.runs_on``."""
    return tuple(torch.cuda.get_arch_list())


def compute(spec: RunSpec) -> dict[str, str]:
    """What a run computes on and how: what can change a number, besides ``versions``.

    Raises:
        UserError: as ``build``.
    """
    libraries = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return compute_stamp(spec, device_of(spec), libraries, repeats=spec.deterministic)


def device_of(spec: RunSpec) -> str:
    """The device of a run; UserError where it or the precision is not to be had here."""
    device = pick_device(spec, "torch", cuda_devices(), cuda_code())
    check_precision(spec, "torch", device, PRECISIONS)
    return device


def _choose_kernels(spec: RunSpec, device: str) -> None:
    """Tells the framework which kernels may serve: their precision, and whether they repeat."""
    torch.set_num_threads(cpu_threads(spec))
    torch.backends.cuda.matmul.allow_tf32 = spec.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = spec.precision == "tf32"
    # Autotuning takes another kernel whenever another one was faster.
    torch.backends.cudnn.benchmark = not spec.deterministic
    torch.backends.cudnn.deterministic = spec.deterministic
    # The backward pass of attention would add in another order each time. The CPU's kernels all
    # repeat, and some of those that this takes there are slower.
    torch.use_deterministic_algorithms(spec.deterministic and device != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


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
