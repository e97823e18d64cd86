"""The CUDA cards of this machine, asked of the driver, and whether a build has code for them.

No framework is asked: OneFlow ends the process where its wheel has no code for the card.
"""

import ctypes
import re
from collections.abc import Collection
from typing import NamedTuple

LIBRARY = "libcuda.so.1"
MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the driver's interface."""
NAME_BYTES = 256


class Card(NamedTuple):
    """One card. capability: major and minor number, e.g. (9, 0) of an H100."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        """The name with the number that a wheel's architectures are compared with."""
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]})"


def cards() -> tuple[Card, ...]:
    """The cards that this process may use, in the order of their CUDA numbers.

    Empty where there is no NVIDIA driver, or it does not answer. Nothing is allocated on a card.
    """
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_card(driver, number) for number in range(count.value))


def _card(driver: ctypes.CDLL, number: int) -> Card:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(NAME_BYTES)
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, NAME_BYTES, device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
    return Card(name.value.decode(errors="replace"), (major.value, minor.value))


def runs_on(capability: tuple[int, int], code: Collection[str]) -> bool:
    """Whether a build runs on a card.

    Machine code serves cards of its own major number and of its own or a higher minor one; PTX
    serves every card that is not older (CUDA C++ Programming Guide, "Application Compatibility").
    Code for one card alone, as ``sm_90a``, serves that capability.

    Args:
        code: what the build was compiled for: ``sm_<number>`` is machine code,
            ``compute_<number>`` PTX, as ``torch.cuda.get_arch_list`` names them.
    """
    return any(_serves(entry, capability) for entry in code)


def _serves(entry: str, capability: tuple[int, int]) -> bool:
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", entry)
    if not found:
        return False
    kind, *number, special = found.groups()
    own = int(number[0]), int(number[1])
    if special:
        return capability == own
    if kind == "compute":
        return capability >= own
    return capability[0] == own[0] and capability[1] >= own[1]
