"""The CUDA cards of this machine, and whether a build of a framework has code for them.

The driver is asked, not the framework: OneFlow ends the process if its wheel has no code for the
card.
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
    """One card.

    Attributes:
        capability: compute capability, (major, minor), e.g. (9, 0) of an H100.
    """

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        """The name and the architecture, e.g. sm_90."""
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]})"


def cards() -> tuple[Card, ...]:
    """The cards that this process may use, in the order of their CUDA numbers.

    There are none if the NVIDIA driver is missing or does not answer. Nothing is allocated on a
    card.
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
    """Whether a build of a framework runs on a card.

    Three kinds of code serve different cards (CUDA C++ Programming Guide, "Application
    Compatibility"):

    - Machine code, e.g. ``sm_86``: cards of its major number and its minor number or a higher one.
    - PTX, e.g. ``compute_90``: every card that is not older.
    - Code with a letter, e.g. ``sm_90a``: cards of exactly this capability.

    Args:
        capability: of the card, (major, minor).
        code: what the build was compiled for, named as in ``torch.cuda.get_arch_list``.
    """
    return any(_serves(entry, capability) for entry in code)


def _serves(entry: str, capability: tuple[int, int]) -> bool:
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", entry)
    if not match:
        return False
    kind, *number, special = match.groups()
    built_for = int(number[0]), int(number[1])
    if special:
        return capability == built_for
    if kind == "compute":
        return capability >= built_for
    return capability[0] == built_for[0] and capability[1] >= built_for[1]
