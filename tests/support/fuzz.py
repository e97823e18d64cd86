"""Reads files with random damage: bits flipped, bytes cut out, pieces of other files spliced in.

    python tests/support/fuzz.py 100000

Each mutant must give its tensors or one clear error, in less than 2 s of processor time, within
twice its size and 200 MiB, and without running anything. A crash ends the process.

The checksums of an archive hide most damage from what reads its members. So half of the mutants of
an archive have damaged or exchanged members and right checksums.
"""

import io
import random
import re
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support import forged
from triptych.core.errors import UserError
from triptych.core.files.reading import read

SMALL = ("torch1.9_legacy.pth", "torch2_numpy2.pth", "paddle3_protocol4/nested.pd")
"""Files of the systems themselves among the seeds."""

MEMORY = Path("/dev/shm")
"""A folder in memory: opening a new file on a disk takes longer than reading it."""

RUNNING = ("exec", "import", "os.system", "subprocess.Popen", "os.exec", "socket.connect")
"""Events of Python's audit that no reading may cause. Not "compile": NumPy parses the header of an
array as a literal."""


def seeds(folder: Path) -> dict[str, bytes]:
    """Honest files of each container."""
    files = dict(forged.honest(folder))
    save_file({"weight": forged.VALUES}, folder / "x.safetensors")
    np.savez(folder / "x.npz", weight=forged.VALUES)
    formats = Path(__file__).resolve().parents[1] / "golden" / "formats"
    paths = [*files.values(), folder / "x.safetensors", folder / "x.npz"]
    paths += [formats / name for name in SMALL]
    return {path.name: path.read_bytes() for path in paths}


def mutant(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """A damaged copy."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data))
        kind = draw.randrange(6)
        if kind < 3:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 3:
            data[place : place + draw.randint(1, 8)] = draw.randbytes(draw.randint(0, 8))
        elif kind == 4:
            start = draw.randrange(len(other))
            data[place:place] = other[start : start + draw.randint(1, 200)]
        elif len(data) > 1 and draw.random() < 0.2:
            del data[place:]
        data = data or bytearray(b"x")
    return bytes(data)


def members(archive: bytes) -> dict[str, bytes]:
    """Name -> content of the members of an archive. Empty: it is none."""
    if not archive.startswith(b"PK"):
        return {}
    with zipfile.ZipFile(io.BytesIO(archive)) as found:
        return {name: found.read(name) for name in found.namelist()}


def repacked(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """An archive whose members are damaged, exchanged, lost or taken from another archive."""
    held = members(content)
    name, second = draw.choice(list(held)), draw.choice(list(held))
    kind = draw.randrange(5)
    if kind < 2:
        held[name] = mutant(held[name] or b"x", other, draw)
    elif kind == 2:
        held[name], held[second] = held[second], held[name]
    elif kind == 3:
        held[name] = draw.choice([*members(other).values(), other])
    else:
        del held[name]
    stream = io.BytesIO()
    packing = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(stream, "w", packing) as archive:
        for member, data in held.items():
            archive.writestr(member, data)
    return stream.getvalue()


def peak() -> int:
    """Bytes of the largest resident memory of this process so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def fuzz(count: int, seed: int = 0, *, report: int = 0) -> dict[str, Any]:
    """Counts of what became of ``count`` mutants; a broken promise raises AssertionError.

    Args:
        count: number of mutants.
        seed: of the damage.
        report: a line is printed after each so many mutants; 0: none.

    Returns:
        Numbers of mutants and of those refused, the slowest in seconds, the largest in bytes, and
        by how many MiB the reading of them all has raised the memory of the process.
    """
    draw = random.Random(seed)
    ran: list[str] = []
    watching = [False]

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event in RUNNING:
            ran.append(f"{event} {arguments[0]}")

    sys.addaudithook(hear)
    "".encode("raw-unicode-escape")  # Python imports this codec when a pickle needs it
    refused, slowest, largest = 0, 0.0, 0
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        contents = seeds(Path(folder))
        path = Path(folder) / "mutant"
        names = list(contents)
        # A small file takes a tenth of the time, and a larger part of it is structure.
        often = [4 if len(content) < 1000 else 1 for content in contents.values()]
        path.write_bytes(b"\x80\x02")
        for name in names:  # what is imported late is imported now
            path.write_bytes(contents[name])
            read(path)
        before = peak()
        for number in range(count):
            if report and number and number % report == 0:
                print(f"{number} mutants, {refused} refused, slowest {slowest:.3f} s", flush=True)
            content, other = (contents[name] for name in draw.choices(names, often, k=2))
            packed = content.startswith(b"PK") and draw.random() < 0.5
            content = (repacked if packed else mutant)(content, other, draw)
            path.write_bytes(content)
            start = time.process_time()
            watching[0] = True
            refused += not readable(path)
            watching[0] = False
            slowest = max(slowest, time.process_time() - start)
            largest = max(largest, len(content))
            assert slowest < 2 and not ran, (slowest, ran, content)
            assert peak() - before < 2 * len(content) + 200 * 2**20, content
        grown = (peak() - before) >> 20
    found = {"slowest": round(slowest, 3), "largest": largest, "grown_mib": grown}
    return {"mutants": count, "refused": refused, **found}


def readable(path: Path) -> bool:
    """Whether a file is read to its last tensor; an error must be one line."""
    try:
        for tensor in read(path).tensors().values():
            tensor.bits().tobytes()
    except UserError as error:
        assert "\n" not in str(error), error
        return False
    return True


if __name__ == "__main__":
    print(fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, report=10_000))
