"""The environment of a run: Python, cores, memory, and the backends that work here.

This module imports only the standard library, so that the set-up can call ``possible()`` in an
interpreter that has nothing installed yet.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

REQUIREMENTS = {
    "torch": "torch torchvision timm",
    "oneflow": "oneflow==0.9.0 nvidia-cudnn-cu11==8.6.0.163 nvidia-cublas-cu11==11.11.3.6 "
    "'numpy<2' 'protobuf<3.21'",
    "paddle": "paddlepaddle",
}
NAMES = tuple(REQUIREMENTS)
PROBE_SECONDS = 180.0
"""Limit on importing one framework, which may read gigabytes from a cold disk."""
PROBE = """
import json, sys
from triptych import backends
from triptych.core.errors import UserError
from triptych.core.machine.devices import why_not
from triptych.core.machine.launchers import forget
forget()
try:
    module = backends.load(sys.argv[1])
    cards, code = range(module.cuda_devices()), module.cuda_code()
    answer = {"versions": module.versions(), "cuda": [why_not(n, sys.argv[1], code) for n in cards]}
except UserError as error:
    answer = {"problem": str(error.__cause__ or error)}
print()
print(json.dumps(answer))
"""
"""Code for a separate process. Frameworks print at import, so the last line is the answer."""
PADDLE_INDEX = "https://www.paddlepaddle.org.cn/packages/stable/cu126/"
PADDLE_BUILDS = (
    "on a GPU: the paddlepaddle-gpu of PyPI ends with 2.6.2, for cards up to sm_86; newer ones "
    f"need Paddle's builds for CUDA 12: pip install paddlepaddle-gpu -i {PADDLE_INDEX}"
)
"""Which build of Paddle serves which card (paddlepaddle.org.cn, "GPU architecture")."""
OWN_GROUPS = Path("/proc/self/cgroup")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows the control groups of this process, and their limits."""
PILLOW = "12.3.0"
"""The pinned version, whose resize defines the pixels; a test compares it with setup.cfg."""


FAST = ("numba", "llvmlite")
"""The packages of the extra that compiles the augmentation."""


def why_not(name: str) -> str:
    """Why this interpreter cannot have a backend; empty if it can."""
    if name == "oneflow" and sys.version_info[:2] != (3, 10):
        return (
            "OneFlow 0.9.0 has wheels up to Python 3.10 only, "
            f"this is {platform.python_version()}; set up with a Python 3.10"
        )
    if name == "oneflow" and (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"OneFlow has wheels for Linux on x86_64 only, this is {platform.platform()}"
    return ""


def possible() -> tuple[str, ...]:
    """Backends that this interpreter and platform can have, installed or not."""
    return tuple(name for name in NAMES if not why_not(name))


def install_command(name: str) -> str:
    """The command that adds a backend to this environment, or repairs it.

    From a checkout the command installs the pinned versions. Elsewhere it names the frameworks
    themselves, since an index could hold another package called triptych.
    """
    root = Path(__file__).resolve().parents[2]
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    if not (root / "constraints").is_dir():
        return f"{pip} {REQUIREMENTS[name]}"
    pins = shlex.quote(str(root / "constraints" / "pins.txt"))
    return f"{pip} -c {pins} -e {shlex.quote(f'{root}[{name}]')}"


def report(names: Sequence[str] = NAMES, timeout: float = PROBE_SECONDS) -> dict[str, Any]:
    """The content of ``tools/info.py env``, as plain data.

    Each framework is imported in a separate process, so that a framework which crashes or hangs is
    reported like a missing one.

    Args:
        names: backends to try.
        timeout: seconds for each backend.
    """
    with ThreadPoolExecutor() as pool:
        probes = list(pool.map(lambda name: _probe(name, timeout), names))
    return {
        "triptych": _version("triptych"),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "cores": cores(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "numpy": _version("numpy"),
        "pillow": _version("pillow"),
        "pillow_pinned": PILLOW,
        "fast": {name: _version(name) for name in FAST},
        "isal": _version("isal"),
        "backends": dict(zip(names, probes, strict=True)),
    }


def cores() -> int:
    """CPU cores that this process may use, at most the quota of its container.

    A quota of one core and a half counts as two.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, min(count, math.ceil(min(_quotas(), default=count))))


def _quotas() -> Iterator[float]:
    """Limits on CPU time, in cores, of the control groups that this process is in.

    OWN_GROUPS names groups of version 2 as ``0::/path``, those of version 1 as
    ``4:cpu,cpuacct:/path``. The limits of the groups around them count, too.
    """
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else []
    for kinds, path in (line.split(":", 2)[1:] for line in lines if line.count(":") >= 2):
        if kinds and "cpu" not in kinds.split(","):
            continue
        # Version 1 is mounted as "cpu" or as "cpu,cpuacct", whatever the order in OWN_GROUPS.
        for root in (CONTROL_GROUPS / name for name in ({kinds, "cpu"} if kinds else {""})):
            inner = Path(os.path.normpath(f"{root}/{path}"))
            for group in {root, inner, *inner.parents}:
                if group.is_relative_to(root):
                    yield from _quota(group)


def _quota(group: Path) -> list[float]:
    """The limit of one control group, if it has one; ``max`` and -1 stand for no limit."""
    with suppress(OSError, ValueError):
        limit, period = map(int, (group / "cpu.max").read_text().split())
        return [limit / period]
    with suppress(OSError, ValueError):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        limit, period = (int((group / name).read_text()) for name in names)
        return [limit / period] if limit > 0 else []
    return []


def memory_bytes() -> int:
    """Physical memory, bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def render(facts: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    pillow = facts["pillow"] or "missing"
    if pillow != facts["pillow_pinned"]:
        pillow += f" (not {facts['pillow_pinned']}, which defines the pixels: runs will not repeat)"
    lines = [
        f"triptych  {facts['triptych'] or 'not installed (running from a checkout)'}",
        f"python    {facts['python']['version']}  {facts['python']['executable']}",
        f"platform  {facts['platform']}",
        f"machine   {facts['cores']} cores, {facts['memory_gib']} GiB of memory",
        f"numpy     {facts['numpy'] or 'missing'}",
        f"pillow    {pillow}",
        f"views     {_views(facts['fast'])}",
        f"checksums {_checksums(facts['isal'])}",
    ]
    for name, backend in facts["backends"].items():
        lines += _render_backend(name, backend)
    return "\n".join(lines)


def _views(packages: dict[str, str]) -> str:
    """How augmentation is computed here."""
    if all(packages.values()):
        return "by compiled loops: " + ", ".join(f"{n} {v}" for n, v in packages.items())
    return "by Pillow alone, three times slower; to add the loops: pip install 'triptych[fast]'"


def _checksums(isal: str) -> str:
    """How the checksums of archives are computed here."""
    if isal:
        return f"by isal {isal}"
    return "by zlib, four times slower; to add isal: pip install 'triptych[fast]'"


def _render_backend(name: str, backend: dict[str, Any]) -> list[str]:
    if backend["usable"]:
        versions = ", ".join(f"{n} {v}" for n, v in backend["versions"].items())
        lines = [f"{name:<9} usable: {versions}; on {', '.join(backend['devices'])}"]
        lines += [f"{'':<9} {device}" for device in backend["unusable_devices"]]
    else:
        lines = [f"{name:<9} not usable: {backend['problem']}"]
        lines += [f"{'':<9} to add it: {backend['remedy']}"] if backend["remedy"] else []
    return [*lines, f"{'':<9} {PADDLE_BUILDS}"] if name == "paddle" else lines


def _probe(name: str, timeout: float) -> dict[str, Any]:
    """Whether a backend works here; its versions and devices, or the problem and a remedy."""
    if why_not(name):
        return _unusable(why_not(name), "")
    if not importlib.util.find_spec(name):
        return _unusable("not installed", install_command(name))
    answer = _import_elsewhere(name, timeout)
    if "problem" in answer:
        return _unusable(answer["problem"], f"{install_command(name)} --force-reinstall")
    cards = {f"cuda:{number}": why for number, why in enumerate(answer["cuda"])}
    return {
        "usable": True,
        "versions": answer["versions"],
        "devices": ["cpu", *(card for card, why in cards.items() if not why)],
        "unusable_devices": [f"not {card}: {why}" for card, why in cards.items() if why],
    }


def _unusable(problem: str, remedy: str) -> dict[str, Any]:
    return {"usable": False, "problem": problem, "remedy": remedy}


def _import_elsewhere(name: str, timeout: float) -> dict[str, Any]:
    """The answer of ``PROBE`` in a separate process."""
    try:
        run = subprocess.run(
            [sys.executable, "-c", PROBE, name],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"importing it did not finish within {timeout:g} s"}
    if run.returncode < 0:
        return {"problem": f"importing it ended with {signal.Signals(-run.returncode).name}"}
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        return {"problem": lines[-1] if lines else f"exit status {run.returncode}"}
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
