"""What the check of a GPU measures in PyTorch: the card's limits, waits, launches, memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from triptych.core.contracts import Batch

PRODUCTS = {
    "bfloat16": (torch.bfloat16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float64": (torch.float64, False),
}
"""Precision -> type of the matrices, and whether TF32 is on."""


def card(device: str) -> str:
    """The name of the device."""
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def ceilings(device: str, size: int) -> dict[str, float]:
    """What the device reaches at most.

    Args:
        size: rows of square matrices.

    Returns:
        By name: "copy" in 1e9 bytes/s read and written, products in 1e12 FLOP/s by precision.
    """
    found = {"copy": _copy_rate(device, 4 * size * size) / 1e9}
    before = torch.backends.cuda.matmul.allow_tf32
    for name, (kind, tf32) in PRODUCTS.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a = torch.ones(size, size, dtype=kind, device=device)
        found[name] = 2 * size**3 / _seconds(device, partial(torch.matmul, a, a)) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


def seconds_of(device: str, step: Callable[[], object], count: int) -> float:
    """Seconds of each of ``count`` calls that follow each other without a wait."""
    _wait(device)
    begun = time.perf_counter()
    for _ in range(count):
        step()
    _wait(device)
    return (time.perf_counter() - begun) / count


@contextmanager
def without_waits(device: str) -> Iterator[None]:
    """In the block it is an error if the host waits for the device."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def activity(device: str, step: Callable[[], object]) -> dict[str, int]:
    """What a call does on the device.

    Returns:
        ``kernels``: number of kernels; on the CPU, of operations.
        ``copies``: number of copies from the host.
        ``pageable``: those of them from memory that is not pinned.
    """
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    with profile(activities=kinds) as found:
        step()
        _wait(device)
    wanted = "CPU" if device == "cpu" else "CUDA"
    names = [event.name for event in found.events() if event.device_type.name == wanted]
    copies = [name for name in names if name.startswith("Memcpy HtoD")]
    return {
        "kernels": sum(not name.startswith(("Mem", "cuda")) for name in names),
        "copies": len(copies),
        "pageable": sum("Pageable" in name for name in copies),
    }


def pinned(device: str, batch: Batch) -> Batch:
    """The batch with its views in memory from which copies make no wait."""
    if device == "cpu":
        return batch
    views = (torch.from_numpy(view).pin_memory().numpy() for view in batch.views)
    return replace(batch, views=tuple(views))


def peak_memory(device: str) -> float:
    """The most memory that tensors have had since the last call, GiB."""
    if device == "cpu":
        return 0.0
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most / 2**30


def _copy_rate(device: str, count: int) -> float:
    """Bytes/s read and written in a copy of ``count`` numbers."""
    source, target = (torch.empty(count, device=device) for _ in range(2))
    return 2 * source.nbytes / _seconds(device, lambda: target.copy_(source))


def _seconds(device: str, call: Callable[[], object]) -> float:
    """Seconds of a call, the best of three series."""
    call()
    return min(seconds_of(device, call, 5) for _ in range(3))


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
