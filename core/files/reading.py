"""Reads files of weights of any system: ``read(path)`` gives the tree of what is in them.

What is read, by content and not by suffix:

- PyTorch's zip and legacy containers (``.pth``, ``.pth.tar``, ``.ckpt``, ``.torch``, ``.bin``);
- Paddle's and other pickles of arrays (``.pdparams``, ``.pdopt``, ``.pd``, ``.pkl``);
- safetensors and npz;
- folders of ``oneflow.save`` and of LiBai (with ``last_checkpoint``, or the folder it names);
- folders with several such files, e.g. of PaddleFleetX or Hugging Face: the tree has one entry for
  each file, by its name, and one for each JSON file.

No framework is needed, and nothing in a file is run. Values stay in the mapped file until they are
asked for, so a file must not be changed while its content is in use.
"""

import io
import json
import os
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from triptych.core.errors import UserError, printable
from triptych.core.files import oneflow, paddle, torch
from triptych.core.files.arrays import NUMBERS, TYPES, npy_header, safetensors_types
from triptych.core.files.constructors import size_of
from triptych.core.files.tree import (
    AGAIN,
    Content,
    Damaged,
    Malformed,
    Node,
    Stored,
    bits_type,
)
from triptych.core.files.zips import Archive, mapped

SUFFIXES = (
    *(".pth", ".pt", ".tar", ".ckpt", ".torch", ".bin", ".pkl"),
    *(".pdparams", ".pdopt", ".pdema", ".pdstates", ".pd"),
    *(".safetensors", ".npz", ".json"),
)
"""Endings of the files that are read in a folder."""

LIBAI = {"optimizer", "lr_scheduler", "graph"}
"""Folders that LiBai writes beside ``model``."""

MAX_JSON = 10 * 2**20
"""Bytes of a JSON file."""

MAX_HEADER = 2**16
"""Bytes in which the header of a NumPy array must end."""

OTHERS = {
    b"\x93NUMPY": "a NumPy array without a name",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive, which must be unpacked first",
    b"version h": "a pointer of Git LFS, in whose place git lfs pull puts the file",
}
"""How files that hold no weights begin -> what they are."""

MAX_FILES = 200
"""Files of a folder."""


def read(path: Path) -> Content:
    """The content of a file or folder of weights.

    Raises:
        UserError: it is missing, damaged, of no known kind, or names something to run. The message
            is one line with the file, what is wrong, and the remedy.
    """
    with _errors_of(path):
        if path.is_dir():
            return Content(path, *_folder(path))
        if not path.is_file():
            raise Malformed("not a file" if path.exists() else "no such file")
        return Content(path, *_file(path))


def _file(path: Path) -> tuple[str, Node]:
    """Container and tree of a file."""
    data = mapped(path)
    head = bytes(data[:9])
    if not head:
        raise Malformed("an empty file: fetch it again")
    if head.startswith(b"PK"):
        archive = Archive(data)
        if not archive.members:
            raise Damaged("an empty archive: it holds nothing")
        if any(name.endswith(".npy") for name in archive.members):
            return "npz", _npz(archive)
        return "torch zip", torch.read_zip(data)
    if head[8:] == b"{":
        return "safetensors", _safetensors(path, data)
    if torch.is_legacy(data):
        return "torch legacy", torch.read_legacy(data)
    if head[:1] == b"\x80" or head[:1] in b"(}]c":
        return paddle.read_pickle(data)
    what = next((name for start, name in OTHERS.items() if head.startswith(start)), None)
    raise Malformed(
        f"{what or f'it begins with {head!r}, which is no known kind'}; expected a file of "
        "PyTorch, Paddle or OneFlow, a pickle of arrays, safetensors or npz"
    )


def _npz(archive: Archive) -> Node:
    """The arrays of a NumPy archive, views of the file where they are stored unpacked."""
    tree: dict[str, Stored] = {}
    for name in archive.members:
        content = archive.read(name)
        head = io.BytesIO(content[:MAX_HEADER])
        shape, by_columns, dtype = npy_header(head)
        values = content[head.tell() :]
        if dtype.kind not in NUMBERS:
            raise Malformed(f"{name!r} holds {str(dtype)[:60]}, expected numbers")
        if size_of(shape) * dtype.itemsize != len(values):
            raise Damaged(
                f"{name!r} is damaged: {len(values)} bytes cannot hold {dtype} of shape {shape}"
            )
        flat = np.frombuffer(values, dtype) if len(values) else np.zeros(0, dtype)
        array = flat.reshape(shape, order="F" if by_columns else "C")
        native = array.astype(dtype.newbyteorder("="), copy=False)
        verify = partial(archive.verify, name, content)
        tree[name.removesuffix(".npy")] = replace(Stored.of(native), verify=verify)
    return tree


def _safetensors(path: Path, data: memoryview) -> Node:
    """The tensors of a safetensors file, which its own library checks first."""
    types = safetensors_types(path)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + length]))
    tree: dict[str, Stored] = {}
    for name, kind in types.items():
        entry, dtype = header[name], TYPES[kind]
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        shape = tuple(entry["shape"])
        values = np.frombuffer(data[start:end], bits_type(dtype)).reshape(shape)
        tree[name] = Stored.of(values, dtype)
    return tree


def _folder(path: Path) -> tuple[str, Node]:
    """Container and tree of a folder."""
    if oneflow.is_folder(path):
        return "oneflow", oneflow.read_folder(path)
    folder = oneflow.last_folder(path) or path
    if folders := oneflow.parts(folder):
        kind = "libai" if LIBAI & folders.keys() else "oneflow"
        return kind, {name: oneflow.read_folder(part) for name, part in folders.items()}
    files = [p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES and p.is_file()]
    if all(p.suffix == ".json" for p in files) or len(files) > MAX_FILES:
        names = ", ".join(printable(name) for name in sorted(os.listdir(path))[:6]) or "nothing"
        raise Malformed(f"a folder without files of weights; it holds {names}; give such a file")
    return "folder", {p.name: _json(p) if p.suffix == ".json" else read(p).tree for p in files}


def _json(path: Path) -> Node:
    with _errors_of(path):
        data = mapped(path)
        if len(data) > MAX_JSON:
            raise Malformed(f"a JSON file of {len(data)} bytes; at most {MAX_JSON} are read")
        try:
            return json.loads(bytes(data))
        except RecursionError as error:
            raise Malformed("a JSON file with too many levels") from error


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except Malformed as error:
        raise UserError(f"{printable(str(path))}: {error}") from error
    except OSError as error:
        raise UserError(
            f"{printable(str(path))}: cannot be read: {error.strerror or error}"
        ) from error
    except (ValueError, LookupError, TypeError, SyntaxError, tokenize.TokenError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        text = f"damaged: {reason}; {AGAIN}"
        raise UserError(f"{printable(str(path))}: {text}") from error
