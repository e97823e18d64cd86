"""Resources of the machine that a run uses: threads and memory."""

import ctypes
import platform
import resource
from contextlib import suppress
from pathlib import Path

from triptych.core.config.spec import RunSpec
from triptych.core.machine.blas import CPUINFO
from triptych.core.machine.environment import cores, memory_bytes
from triptych.core.machine.launchers import launched

STATUS = Path("/proc/self/status")
MEMINFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")
"""The control group of this container, if there is one (cgroup v2)."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's ``mallopt``."""


def processor() -> frozenset[str]:
    """The words of /proc/cpuinfo, such as vendor and flags; empty if there is no such file."""
    return frozenset(CPUINFO.read_text().split() if CPUINFO.is_file() else ())


def processor_name() -> str:
    """The name of the processor, with what matters most of its units."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    units = [unit for unit in ("avx2", "avx512f", "amx_bf16") if unit in processor()]
    return f"{next(names, platform.machine())} ({', '.join(units) or 'no vector units known'})"


def keep_memory() -> None:
    """Makes the C library keep freed memory for the next array.

    Otherwise the memory of a large array goes back to the kernel, and each page of the next array
    costs a page fault. That takes longer than the arithmetic on the array.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # Older versions of glibc reject a threshold above 32 MiB.
        if not libc.mallopt(M_MMAP_THRESHOLD, 1 << 30):
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def peak_memory_mib() -> float:
    """The most memory that this process has had so far, MiB. A mapped file counts where it is read.

    ``getrusage`` counts the memory of the process that started this one, too. It serves where
    there is no /proc.
    """
    if STATUS.is_file():
        words = STATUS.read_text().split()
        return int(words[words.index("VmHWM:") + 1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_threads(spec: RunSpec) -> int:
    """Threads of the framework: the spec's number, or for "auto" this process's share of the cores.

    Processes that a launcher has started on one machine share its cores.
    """
    if spec.threads != "auto":
        return spec.threads
    return max(1, cores() // launched().local_world)


def free_memory() -> int:
    """Bytes that new data may fill: of the machine, or of this container if that has fewer.

    On Linux the sources are MemAvailable and the control group's files (docs.kernel.org, proc.rst
    and cgroup-v2.rst). Elsewhere the answer is all physical memory.
    """
    limits = [memory_bytes()]
    with suppress(OSError):
        limits.append(1024 * _fields(MEMINFO)["MemAvailable:"])
    with suppress(OSError, ValueError):  # the limit is the word "max" where there is none
        limit, used = (int((CONTROL_GROUP / f"memory.{k}").read_text()) for k in ("max", "current"))
        stat = _fields(CONTROL_GROUP / "memory.stat")
        # The kernel drops cached files when memory is needed.
        limits.append(max(0, limit - used + stat["active_file"] + stat["inactive_file"]))
    return min(limits)


def _fields(path: Path) -> dict[str, int]:
    """First and second word of each line."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows}
