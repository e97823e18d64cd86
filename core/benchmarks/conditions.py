"""What the figures of a benchmark depend on, beside the machine: rounds, threads, versions."""

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

FRAMEWORKS = ("torch", "oneflow", "paddlepaddle")
"""The packages of the backends."""


def conditions(rounds: int, threads: int, packages: Sequence[str]) -> dict[str, Any]:
    """The entries of a result with the conditions of its figures.

    Args:
        rounds: how many times each side is measured.
        threads: of each process that computes.
        packages: those with a part in the figures; see ``versions``.
    """
    return {"rounds": rounds, "threads": threads, "versions": versions(packages)}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of Python and of the packages that are installed, by name."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def line(result: Mapping[str, Any], *, of: str = "") -> str:
    """The conditions in a result as the line of a table.

    Args:
        of: what has the threads, such as " for each worker".
    """
    rounds, threads = (counted(result[name], name[:-1]) for name in ("rounds", "threads"))
    return f"{rounds}, {threads}{of}; {listed(result['versions'])}"


def listed(found: Mapping[str, str]) -> str:
    """Names and versions as the part of a sentence."""
    return ", ".join(f"{name} {number}" for name, number in found.items())


def counted(count: int, thing: str) -> str:
    """A number and its noun."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
