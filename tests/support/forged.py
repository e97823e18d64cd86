"""Forges files of weights, honest and hostile, byte by byte: no framework would write these."""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from triptych.core.errors import UserError
from triptych.core.files.reading import read

CENTRAL = b"PK\x01\x02"
"""Begins the entry of a member in the directory of an archive."""

MAGIC = 0x1950A86A20F9469CFC6C


def name(module: str, attribute: str) -> bytes:
    """Pushes what a name stands for."""
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    """Pushes a text."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    """Pushes the result of a call."""
    return name(module, attribute) + b"(" + b"".join(arguments) + b"tR"


def whole(*operations: bytes) -> bytes:
    """A pickle of protocol 2 of what the operations push."""
    return b"\x80\x02" + b"".join(operations) + b"."


def number(value: int) -> bytes:
    """Pushes an integer."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(*values: int) -> bytes:
    """Pushes a tuple of integers."""
    return b"(" + b"".join(number(value) for value in values) + b"t"


def storage(key: str = "0", count: int = 6, kind: str = "FloatStorage") -> bytes:
    """Pushes a storage of PyTorch."""
    parts = (text("storage"), name("torch", kind), text(key), text("cpu"), number(count))
    return b"(" + b"".join(parts) + b"tQ"


def tensor(
    shape: bytes = numbers(2, 3),
    strides: bytes = numbers(3, 1),
    offset: bytes = number(0),
    where: bytes = storage(),
) -> bytes:
    """Pushes a tensor of PyTorch."""
    rest = b"\x89" + call("collections", "OrderedDict")
    return call("torch._utils", "_rebuild_tensor_v2", where, offset, shape, strides, rest)


def state(value: bytes, key: str = "weight") -> bytes:
    """The pickle of a dictionary with one entry."""
    return whole(b"}" + text(key) + value + b"s")


def torch_zip(
    content: bytes, storages: Mapping[str, bytes], packing: int = zipfile.ZIP_STORED
) -> bytes:
    """A file as ``torch.save`` writes it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def torch_legacy(content: bytes, storages: Mapping[str, bytes], itemsize: int = 4) -> bytes:
    """A file as ``torch.save`` wrote it before version 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    heads = [pickle.dumps(x, protocol=2) for x in (MAGIC, 1001, system)]
    keys = pickle.dumps(list(storages), protocol=2)
    data = [struct.pack("<q", len(d) // itemsize) + d for d in storages.values()]
    return b"".join([*heads, content, keys, *data])


def oneflow_folder(path: Path, content: bytes, tensors: Mapping[str, np.ndarray]) -> Path:
    """A folder as ``oneflow.save`` writes it, of float32 tensors."""
    path.mkdir()
    entries = b"(" + text("protocol_version") + number(1) + text("data") + content + b"u"
    (path / "pickled_data").write_bytes(whole(b"}" + entries))
    for folder, values in tensors.items():
        (path / folder).mkdir()
        (path / folder / "out").write_bytes(values.tobytes())
        dims = "".join(f"  dim: {n}\n" for n in values.shape)
        (path / folder / "meta").write_text(f"shape {{\n{dims}}}\ndata_type: kFloat\n")
    return path


def oneflow_tensor(folder: str) -> bytes:
    """Pushes a tensor of OneFlow."""
    return name("oneflow", "Tensor") + b")\x81}" + text("path") + text(folder) + b"sb"


VALUES = np.arange(6, dtype="<f4").reshape(2, 3)
"""The values of the tensor in the honest files."""


def honest(folder: Path) -> dict[str, Path]:
    """One small file of each container, with the tensor ``weight``."""
    files = {
        "torch zip": torch_zip(state(tensor()), {"0": VALUES.tobytes()}),
        "torch legacy": torch_legacy(state(tensor()), {"0": VALUES.tobytes()}),
        "paddle": pickle.dumps({"weight": VALUES}, protocol=4),
    }
    for container, content in files.items():
        (folder / container.replace(" ", ".")).write_bytes(content)
    return {container: folder / container.replace(" ", ".") for container in files}


REMEDIES = ("again", "anew", "give ", "expected ", "copy the files", "save ", "no such file")
"""Words of which the message of each error has one. That a file is missing is a remedy itself."""


def complaint(path: Path) -> str:
    """The message that refuses a file: one line that names the file and a remedy."""
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and message.isprintable()
    assert any(word in message for word in REMEDIES), message
    return message
