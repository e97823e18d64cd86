"""A file of weights that is made to use up memory or time uses neither."""

import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.support import forged
from tests.support.forged import CENTRAL, complaint, name, number, state, tensor, text, whole
from triptych.core.errors import UserError
from triptych.core.files import reading
from triptych.core.formats import read_arrays

MANY = 500_000
"""Operations of a bomb: more than the objects that a small file may have."""


def laughs(levels: int, start: bytes, mark: bytes) -> bytes:
    """Each level holds the one below ten times."""
    layers = [start + b"q\x00"]
    for level in range(levels):
        below, above = bytes([level]), bytes([level + 1])
        layers.append(b"0(" + (b"h" + below) * 10 + mark + b"q" + above)
    return b"".join(layers)


BOMBS = {
    "deep lists": (whole(b"]" * 100_000 + b"a" * 99_999), "nested deeper"),
    "deep tuples": (whole(b")" + b"\x85" * 200_000), "nested deeper"),
    "a deep key": (whole(b"})" + b"\x85" * 200_000 + b"Ns"), "a key of type tuple"),
    "a wide key": (whole(b"}(" + b"N" * 200_000 + b"tNs"), "a key of type tuple"),
    "a huge number as key": (whole(b"}" + number(2**100) + b"Ns"), "a key of type int"),
    "laughing tuples": (whole(laughs(60, b"N", b"t")), "by repetition"),
    "laughing lists": (whole(laughs(60, b"N", b"l")), "by repetition"),
    "laughing keys": (whole(b"}" + laughs(60, b"N", b"t") + b"Ns"), "a key of type tuple"),
    "inside itself": (whole(b"]q\x00h\x00a"), "inside itself"),
    "a dictionary inside itself": (whole(b"}q\x00" + text("a") + b"h\x00s"), "inside itself"),
    "empty dictionaries": (whole(b"(" + b"}" * MANY + b"l"), "more objects"),
    "empty sets": (whole(b"(" + b"\x8f" * MANY + b"l"), "more objects"),
    "marks": (whole(b"(" * MANY), "more objects"),
    "memo": (whole(b"N" + b"\x94" * MANY), "more objects"),
    "far memo": (whole(b"Nr\xff\xff\xff\xff"), None),
    "copies": (
        whole(
            *(b"(" + b"N" * 100_000 + b"t\x85q\x00", name("builtins", "tuple") + b"q\x01"),
            (b"h\x01h\x00R") * 10_000,
        ),
        "more objects",
    ),
    "copies of bytes": (
        whole(
            *(name("_codecs", "encode") + b"q\x00", text("x" * 10**6) + b"q\x01"),
            (b"h\x00h\x01" + text("latin1") + b"\x86R") * 10_000,
        ),
        "more objects",
    ),
    "wide text": (whole(text("x" * 2**21 + "\U0001f600")), "does not hold the values"),
    "a long integer": (whole(b"\x8b" + struct.pack("<i", 10**6) + b"\xff" * 10**6), "an integer"),
    "a long number": (b"(I" + b"9" * 900 + b"\nl.", None),
    "long numbers": (b"(" + (b"L" + b"9" * 990 + b"L\n") * 2000 + b"l.", None),
    "a length": (whole(b"\x8e" + b"\xff" * 8), "cut short"),
    "a text length": (whole(b"X" + b"\xff" * 4), "cut short"),
    "a frame": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", None),
    "a protocol": (b"\x80\xff.", "protocol 255"),
    "nothing": (b"\x80\x02.", "takes more objects"),
    "two objects": (whole(b"NN"), "more than one object"),
    "tail": (whole(b"N") + b"x", "bytes behind its pickle"),
    "lines": (b"(" + (b"S'" + b"a" * 500 + b"'\n") * 20_000 + b"l.", None),
    "a line": (b"(S'" + b"a" * 5_000_000, "a line without an end"),
}

CHILD = r"""
import json, re, sys, time
from pathlib import Path
from triptych.core.errors import UserError
from triptych.core.files.reading import read
def peak():
    # Not getrusage: its peak is that of the parent process at least.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
for path in map(Path, sys.argv[1:]):
    before, start = peak(), time.process_time()
    try:
        read(path)
        message = ""
    except UserError as error:
        message = str(error)
    seconds = time.process_time() - start
    print(json.dumps([path.name, message, seconds, peak() - before, path.stat().st_size]))
"""


def measured(paths: list[Path]) -> list[tuple[str, str, float, int, int]]:
    """Name, message, seconds, growth of the memory and size of each file, read in one child."""
    command = [sys.executable, "-c", CHILD, *map(str, paths)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in shown.splitlines()]


def test_bombs_take_neither_time_nor_memory(tmp_path):
    for index, (content, _) in enumerate(BOMBS.values()):
        (tmp_path / f"{index:02}.pkl").write_bytes(content)
    # The bombs of archives: 300 MiB in 300 KiB.
    packed = forged.torch_zip(state(tensor()), {"0": bytes(300 * 2**20)}, zipfile.ZIP_DEFLATED)
    (tmp_path / "zy.pth").write_bytes(packed)
    np.savez_compressed(tmp_path / "zz.npz", weight=np.zeros(300 * 2**18, np.float32))
    reasons = [(key, reason) for key, (_, reason) in BOMBS.items()]
    reasons += [("zip", "a zip bomb"), ("npz", "a zip bomb")]
    rows = measured(sorted(tmp_path.iterdir()))
    assert len(rows) == len(reasons)
    for (bomb, reason), (_, message, seconds, growth, size) in zip(reasons, rows, strict=True):
        assert (reason in message) if reason else not message, (bomb, message)
        assert seconds < 4, (bomb, seconds)  # 2 s on a quiet processor
        assert growth < 2 * size + 200 * 2**20, (bomb, growth)


def test_an_npz_bomb_is_refused_wherever_arrays_are_read(tmp_path):
    np.savez_compressed(tmp_path / "w.npz", **{"student.encoder.norm": np.zeros(200 * 2**18)})
    for reader in (reading.read, read_arrays):
        with pytest.raises(UserError, match="refused as a zip bomb"):
            reader(tmp_path / "w.npz")


def test_a_directory_of_many_members_is_refused(tmp_path):
    entry = CENTRAL + bytes(42)
    content = entry * 300_000
    end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 65535, 65535, len(content), 0, 0)
    wide = struct.pack(
        "<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, *[300_000] * 2, len(content), 0
    )
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(content), 1)
    (tmp_path / "x.pth").write_bytes(b"PK" + content[2:] + wide + locator + end)
    assert "300000 members" in complaint(tmp_path / "x.pth")
