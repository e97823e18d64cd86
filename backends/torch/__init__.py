"""The PyTorch backend."""

from collections.abc import Mapping

import torch

from triptych.backends.torch.engine import Engine
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array
from triptych.core.machine.devices import check_precision, pick_device
from triptych.core.machine.resources import cpu_threads

# float16 needs loss scaling, which this version does not have.
PRECISIONS = {
    "cpu": ("float32", "float64", "bfloat16"),
    "cuda": ("float32", "float64", "bfloat16"),
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


def build(spec: RunSpec, state: Mapping[str, Array]) -> Engine:
    """An engine whose model holds ``state``; the optimizer is fresh.

    Args:
        state: every tensor of ``core.parameters.table(spec)``.

    Raises:
        UserError: a device or precision that is not to be had here.
    """
    device = pick_device(spec, "torch", cuda_devices(), cuda_code())
    check_precision(spec, "torch", device, PRECISIONS)
    torch.set_num_threads(cpu_threads(spec))
    # Parity first: TF32 keeps ten bits of a float32's fraction, and autotuning picks kernels.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return Engine(spec, state, device)
