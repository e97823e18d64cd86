"""Writes files of weights that each system's own loader opens, without that system.

``write(path, tree, container)`` streams one tensor after the other and replaces ``path`` only when
the new file is whole. What each container holds:

- "torch": any tree; opened by ``torch.load(weights_only=True)``.
- "paddle": any tree without bytes; opened by ``paddle.load``. bfloat16 is stored as
  uint16, as Paddle does it.
- "oneflow": any tree, as a folder; opened by ``oneflow.load``.
- "libai": a dictionary with one entry, the name of a checkpoint -> parts; each part is a folder of
  OneFlow. A file beside the checkpoint names it, as LiBai's loader wants.
- "safetensors", "npz": a dictionary of tensors. npz widens bfloat16 to float32.
- "pickle": any tree without bytes, with NumPy arrays, as detectron2 opens it.
- "folder": a dictionary of files, whose suffixes say what they are.
"""

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core.errors import UserError
from triptych.core.files import oneflow
from triptych.core.files.arrays import TYPES
from triptych.core.files.emitting import Emitter, Writable, stream_values
from triptych.core.files.paddle import NAMES
from triptych.core.files.torch import STORAGES, row_major
from triptych.core.files.tree import Node, Stored, tensors
from triptych.core.files.writing import opened, sync
from triptych.core.files.zipping import zip_writer
from triptych.core.machine.interrupts import leave_tidily

_npy: Any = np.lib.format
# Any: it is public, but only some versions annotate it.

THREADS = 32
"""Number of files that are brought to the disk at once."""

EARLIER = ".earlier"
"""End of the name of what is about to be replaced."""

ALIGNMENT = 64
"""The values of each tensor begin at a multiple of this, as PyTorch writes them."""


def write(path: Path, tree: Node, container: str) -> None:
    """Writes a tree; see the module for the containers.

    Args:
        path: of the file, or of the folder for "oneflow". An earlier one is replaced.
        tree: as ``core.files.reading.read`` gives it.
        container: a key of ``WRITERS``.

    Raises:
        UserError: the container cannot hold the tree, or the disk is full. The earlier file stays.
    """
    with whole(path) as aside:
        WRITERS[container](aside, tree)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path aside for the block to write at. What is there at its end replaces ``path``.

    What a killed process left aside is removed, or put back if it was the earlier folder.

    Raises:
        UserError: the block could not write. The earlier file or folder stays.
        SystemExit: there was a SIGTERM.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with leave_tidily(), _cleaned(path, aside):
        _recover(path)
        yield aside
        if path.exists():
            # A power cut must not lose both. A new file is written as cp writes one.
            _sync_all(aside)
        _replace(aside, path)


def _recover(path: Path) -> None:
    """Ends what a killed process of this machine began: see ``_replace``."""
    left = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,9}})({re.escape(EARLIER)})?")
    for other in [p for p in path.parent.iterdir() if p.name.startswith(f".{path.name}.")]:
        found = left.fullmatch(other.name)
        if not found or _is_alive(int(found[1])):
            continue
        if found[2] and not path.exists():
            os.rename(other, path)
        else:
            remove(other)


def _is_alive(process: int) -> bool:
    """Whether another process with this number runs on this machine."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_all(path: Path) -> None:
    """Waits until a file, or all of a folder, is on the disk."""
    # Side by side, since the file system brings several files to the disk in one turn.
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(sync, {path, *_files(path)}))


def _files(path: Path) -> list[Path]:
    """The files in a folder and its folders, or the file itself."""
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]


def write_torch(path: Path, tree: Node) -> None:
    """The zip container of PyTorch. Equal ``Stored`` objects share their storage."""
    names = {dtype: name for name, dtype in STORAGES.items()}
    keys: dict[int, str] = {}
    found: list[Stored] = []

    def tensor(emitter: Emitter, stored: Stored) -> None:
        if stored.dtype not in names:
            raise UserError(f"tensors of type {stored.dtype} cannot be written for PyTorch")
        if id(stored) not in keys:
            keys[id(stored)] = str(len(found))
            found.append(stored)
        _torch_tensor(emitter, stored, names[stored.dtype], keys[id(stored)])

    pickle = io.BytesIO()
    emitter = Emitter(pickle, tensor, protocol=2)
    emitter.node(tree)
    emitter.stop()
    with zip_writer(path) as archive:
        archive.put("archive/data.pkl", pickle.getvalue())
        archive.put("archive/byteorder", b"little")
        for key, stored in enumerate(found):
            archive.begin(f"archive/data/{key}", stored.nbytes, ALIGNMENT, stored.checksum)
            stream_values(archive, stored.bits())
        archive.put("archive/version", b"3\n")


def _torch_tensor(emitter: Emitter, stored: Stored, kind: str, key: str) -> None:
    count = int(np.prod(stored.shape, dtype=object))
    emitter.name("torch._utils", "_rebuild_tensor_v2")
    emitter.raw(b"((")
    emitter.node("storage")
    emitter.name("torch", kind)
    for value in (key, "cpu", count):
        emitter.node(value)
    emitter.raw(b"tQ")
    emitter.node(0)
    emitter.ints(stored.shape)
    emitter.ints(row_major(stored.shape))
    emitter.raw(b"\x89")
    emitter.name("collections", "OrderedDict")
    emitter.raw(b")RtR")


def write_paddle(path: Path, tree: Node) -> None:
    """Paddle's pickle: arrays beside a table of names, or pairs (name, array) if it is nested."""
    named = {key: stored for key, stored in tensors(tree) if stored.unique}
    flat = isinstance(tree, dict) and all(tree.get(key) is s for key, s in named.items())
    if named and flat and NAMES not in tree:
        # paddle.load leaves an array alone that is not in the table.
        tree = {**tree, NAMES: {key: stored.unique or key for key, stored in tensors(tree)}}

    def tensor(emitter: Emitter, stored: Stored) -> None:
        if not named or flat:
            emitter.array(stored)
            return
        emitter.name("builtins", "tuple")
        emitter.node(stored.unique or "tensor")
        emitter.array(stored)
        emitter.raw(b"\x86\x85R")

    with opened(path) as stream:
        emitter = Emitter(stream, tensor, protocol=4, binary=False)
        emitter.node(tree)
        emitter.stop()


def write_oneflow(path: Path, tree: Node) -> None:
    """A folder of OneFlow, with a folder for each tensor."""
    types = {dtype: name for name, dtype in reversed(oneflow.TYPES.items())}
    folders: dict[int, str] = {}

    def tensor(emitter: Emitter, stored: Stored) -> None:
        if stored.dtype not in types or stored.dtype == "bfloat16":
            raise UserError(
                f"OneFlow loads no tensors of type {stored.dtype}, and one of shape {stored.shape} "
                "has it; torch, paddle and canonical hold it"
            )
        if id(stored) not in folders:
            folders[id(stored)] = f"tensor_{len(folders)}"
            _oneflow_tensor(path / folders[id(stored)], stored, types[stored.dtype])
        emitter.name("oneflow", "Tensor")
        emitter.raw(b")\x81")
        emitter.node({"path": folders[id(stored)]})
        emitter.raw(b"b")

    path.mkdir()
    with opened(path / oneflow.PICKLE) as stream:
        emitter = Emitter(stream, tensor, protocol=4)
        emitter.node({"protocol_version": 1, "data": tree})
        emitter.stop()


def _oneflow_tensor(folder: Path, stored: Stored, kind: str) -> None:
    folder.mkdir()
    dims = "".join(f"  dim: {size}\n" for size in stored.shape)
    (folder / "meta").write_text(f"shape {{\n{dims}}}\ndata_type: {kind}\n")
    with opened(folder / "out") as stream:
        stream_values(stream, stored.bits())


def write_libai(path: Path, tree: Node) -> None:
    """A run folder of LiBai with one checkpoint."""
    ((name, parts),) = tree.items()
    (path / name).mkdir(parents=True)
    for part, content in parts.items():
        write_oneflow(path / name / part, content)
    (path / oneflow.LAST).write_text(name)


def write_folder(path: Path, tree: Node) -> None:
    """A folder of files."""
    path.mkdir()
    for name, content in tree.items():
        file = path / name
        if file.suffix == ".json":
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        else:
            WRITERS[FILES[file.suffix]](file, content)


def write_safetensors(path: Path, tree: Node) -> None:
    """A safetensors file."""
    with opened(path) as stream:
        stream_safetensors(stream, tree)


def stream_safetensors(stream: Writable, tree: Node) -> None:
    """The bytes of a safetensors file."""
    names = {dtype: name for name, dtype in TYPES.items()}
    # transformers refuses a file that does not say which framework it is for.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, stored in _flat(tree, "safetensors"):
        if stored.dtype not in names:
            raise UserError(f"{name}: safetensors has no type {stored.dtype}")
        end = position + stored.nbytes
        offsets = [position, end]
        header[name] = {"dtype": names[stored.dtype], "shape": list(stored.shape)}
        header[name]["data_offsets"] = offsets
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for _, stored in _flat(tree, "safetensors"):
        stream_values(stream, stored.bits())


def write_npz(path: Path, tree: Node) -> None:
    """A NumPy archive, not packed."""
    with zip_writer(path) as archive:
        for name, stored in _flat(tree, "npz"):
            values = np.asanyarray(stored.array())
            head = io.BytesIO()
            described = {"descr": values.dtype.newbyteorder("<").str, "shape": values.shape}
            _npy.write_array_header_1_0(head, {**described, "fortran_order": False})
            archive.begin(f"{name}.npy", head.tell() + values.nbytes, ALIGNMENT)
            archive.write(head.getvalue())
            stream_values(archive, values)


def _flat(tree: Node, container: str) -> list[tuple[str, Stored]]:
    """The tensors of a tree that holds nothing else."""
    items = list(tree.items()) if isinstance(tree, dict) else []
    other = next((key for key, value in items if not isinstance(value, Stored)), None)
    if other is not None or not isinstance(tree, dict):
        raise UserError(f"{container} holds only named tensors, not {other or 'this tree'}")
    return items


WRITERS: dict[str, Callable[[Path, Node], None]] = {
    "torch": write_torch,
    "paddle": write_paddle,
    "oneflow": write_oneflow,
    "libai": write_libai,
    "safetensors": write_safetensors,
    "npz": write_npz,
    "pickle": write_paddle,
    "folder": write_folder,
}
"""Container -> what writes it."""

FILES = {
    ".safetensors": "safetensors",
    ".bin": "torch",
    ".pdparams": "paddle",
    ".pdopt": "paddle",
}
"""Suffix of a file in a folder -> its container. A JSON file has none."""


@contextmanager
def _cleaned(path: Path, aside: Path) -> Iterator[None]:
    """Removes what is half written, and names the file in errors."""
    try:
        yield
    except OSError as error:
        reason = f"cannot write: {error.strerror}; free some space or choose another disk"
        raise UserError(f"{path}: {reason}") from error
    except UserError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
    finally:
        remove(aside)


def _replace(aside: Path, path: Path) -> None:
    """Puts the new file or folder in the place of the earlier one."""
    if not path.exists() or (path.is_file() and aside.is_file()):
        os.replace(aside, path)
        return
    # A folder replaces no file and a file no folder, so the earlier one leaves first.
    earlier = path.with_name(f"{aside.name}{EARLIER}")
    try:
        os.rename(path, earlier)
        os.rename(aside, path)
    finally:
        if not path.exists():
            os.rename(earlier, path)
    remove(earlier)


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
