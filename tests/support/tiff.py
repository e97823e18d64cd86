"""A writer of small TIFF files, for the layouts that Pillow reads and does not write."""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RGB, GREY = 2, 1


def write_tiff(
    path: Path,
    pixels: NDArray[np.uint8] | NDArray[np.uint16],
    *,
    extra: tuple[int, ...] = (),
    photometric: int = RGB,
    separate: bool = False,
    order: str = "<",
    tags: tuple[tuple[int, int], ...] = (),
) -> None:
    """One strip, or one for each plane, without compression.

    Args:
        pixels: (H, W, bands).
        extra: ExtraSamples: 0 unspecified, 1 associated alpha, 2 unassociated.
        separate: the bands lie one after another.
        order: of bytes, "<" or ">".
        tags: more of them, each with one SHORT.
    """
    height, width, bands = pixels.shape
    stored = pixels.astype(pixels.dtype.newbyteorder(order))
    strips = (
        [stored[..., band].tobytes() for band in range(bands)] if separate else [stored.tobytes()]
    )
    entries = {
        256: ("H", [width]),
        257: ("H", [height]),
        258: ("H", [8 * pixels.itemsize] * bands),
        259: ("H", [1]),
        262: ("H", [photometric]),
        273: ("I", [0] * len(strips)),
        277: ("H", [bands]),
        278: ("H", [height]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [2 if separate else 1]),
        **({338: ("H", list(extra))} if extra else {}),
        **{tag: ("H", [value]) for tag, value in tags},
    }
    # The values of every tag lie behind the directory, then the strips.
    start = 8 + 2 + 12 * len(entries) + 4
    sizes = {tag: len(values) * struct.calcsize(kind) for tag, (kind, values) in entries.items()}
    place = start + sum(size for size in sizes.values() if size > 4)
    entries[273] = ("I", [place + sum(map(len, strips[:number])) for number in range(len(strips))])
    directory, values = b"", b""
    for tag, (kind, numbers) in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        field = packed.ljust(4, b"\0")
        if len(packed) > 4:
            field = struct.pack(f"{order}I", start + len(values))
            values += packed
        directory += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(numbers)) + field
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    path.write_bytes(head + directory + bytes(4) + values + b"".join(strips))
