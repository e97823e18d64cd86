"""The PyTorch backend."""

from collections.abc import Mapping

import torch

from triptych.backends.torch import kernels
from triptych.backends.torch.engine import Engine
from triptych.backends.torch.parallel import join as join  # for core.launch
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE, Array, Ranks
from triptych.core.machine.devices import (
    check_precision,
    compiles,
    compute_stamp,
    pick_device,
)
from triptych.core.machine.failures import device_failures
from triptych.core.machine.resources import cpu_threads, keep_memory

PRECISIONS = {
    "cpu": ("float32", "float64", "bfloat16", "float16"),
    "cuda": ("float32", "float64", "tf32", "bfloat16", "float16"),
}


def versions() -> dict[str, str]:
    """The versions and settings that can change the numbers of a run, by name."""
    import timm
    import torchvision

    return {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
        "float32 products": "oneDNN" if kernels.serve() else "default",
    }


def cuda_devices() -> int:
    """The number of CUDA devices that the framework sees."""
    return torch.cuda.device_count()


def cuda_code() -> tuple[str, ...]:
    """The GPU architectures of the framework's build (see ``core.machine.cuda.runs_on``)."""
    return tuple(torch.cuda.get_arch_list())


def compute(spec: RunSpec) -> dict[str, str]:
    """The device, libraries and settings that can change a run's numbers, besides ``versions``.

    Raises:
        UserError: as in ``device_of``.
    """
    libraries = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    device, repeats = device_of(spec), spec.deterministic
    compiled = compiles(spec, "torch", device, able=True)
    return compute_stamp(spec, device, libraries, repeats=repeats, compiled=compiled)


def device_of(spec: RunSpec) -> str:
    """The device of a run, "cpu" or "cuda:N".

    Raises:
        UserError: this machine or the backend lacks the device, the precision or a compiler.
    """
    device = pick_device(spec, "torch", cuda_devices(), cuda_code())
    check_precision(spec, "torch", device, PRECISIONS)
    compiles(spec, "torch", device, able=True)
    return device


def _choose_kernels(spec: RunSpec, device: str) -> None:
    """Sets the precision of the framework's kernels, and whether they must be deterministic."""
    torch.set_num_threads(cpu_threads(spec))
    keep_memory()  # PyTorch keeps no freed memory on the CPU
    float32 = device == "cpu" and spec.precision == "float32"
    kernels.choose(onednn=float32 and kernels.serve())
    torch.backends.cuda.matmul.allow_tf32 = spec.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = spec.precision == "tf32"
    # Autotuning chooses the kernel that was the fastest in this process, not always the same one.
    torch.backends.cudnn.benchmark = not spec.deterministic
    torch.backends.cudnn.deterministic = spec.deterministic
    # Otherwise the backward pass of attention adds in another order each time. All CPU kernels are
    # deterministic, and there this switch would choose some slower ones.
    torch.use_deterministic_algorithms(spec.deterministic and device != "cpu")
    if compiles(spec, "torch", device, able=True):
        # Of one function: student or teacher, with or without statistics, one or two batch sizes.
        torch._dynamo.config.cache_size_limit = 64
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


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
    if device != "cpu":
        torch.cuda.set_device(device)  # NCCL exchanges what is on the current device
    with device_failures(Engine.failures, spec, device):
        return Engine(spec, state, device, ranks)
