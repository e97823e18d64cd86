"""Finds and reads checkpoints.

A checkpoint that is not as ``store`` wrote it is damaged, and is never used.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from triptych.core.checkpoint.manifest import FileEntry, Manifest
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.files import reading
from triptych.core.files.tree import Stored

FOLDER, MANIFEST = "checkpoints", "manifest.json"
DISPLACED = ".old"
"""Suffix of a checkpoint while another one of the same step takes its place."""
NAME = re.compile(rf"step-(\d{{8,}})({re.escape(DISPLACED)})?")
CHUNK = 1 << 20
"""Bytes hashed at a time."""


class DamagedCheckpoint(UserError):
    """A checkpoint differs from what was written.

    Attributes:
        path: the checkpoint.
        reason: the damaged file and the damage.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason}); name another one, or use --resume auto")
        self.path, self.reason = path, reason


def verify(path: Path) -> Manifest:
    """Checks all files of a checkpoint and returns its manifest.

    Raises:
        UserError: there is no such folder.
        DamagedCheckpoint: a file is missing or differs from what was written.
    """
    manifest = _manifest(path)
    for name, entry in manifest.files.items():
        _check_size(path, name, entry)
        with _damage(path, name):
            intact = sha256(path / name) == entry.sha256
        if not intact:
            raise DamagedCheckpoint(path, f"{name}: its content has changed since it was written")
    return manifest


def read(path: Path) -> tuple[Manifest, State]:
    """Verifies and reads a checkpoint. bfloat16 is widened to float32.

    Raises:
        UserError: there is no such folder.
        DamagedCheckpoint: a file is missing, differs from what was written, or does not hold the
            tensors that the manifest lists.
    """
    manifest, tensors = mapped(path)
    return manifest, {name: np.array(stored.array()) for name, stored in tensors.items()}


def mapped(path: Path) -> tuple[Manifest, dict[str, Stored]]:
    """As ``read``; the values stay in the mapped files until they are used."""
    manifest = verify(path)
    found: dict[str, Stored] = {}
    for name in manifest.files:
        with _damage(path, name):
            tensors = reading.read(path / name).tensors()
        for tensor, stored in tensors.items():
            entry = manifest.tensors.get(tensor)
            listing = entry and (entry.file, entry.dtype, tuple(entry.shape))
            if listing != (name, stored.dtype, stored.shape):
                raise DamagedCheckpoint(path, f"{name}: {tensor} is not as the manifest lists it")
            found[tensor] = stored
    if missing := [tensor for tensor in manifest.tensors if tensor not in found]:
        raise DamagedCheckpoint(path, f"{MANIFEST}: no file holds {missing[0]}")
    return manifest, {tensor: found[tensor] for tensor in manifest.tensors}


def latest(run_dir: Path, report: Callable[[str], None]) -> Path | None:
    """Finds the newest whole checkpoint of a run.

    Args:
        report: called with a line for each damaged checkpoint that is newer.

    Returns:
        The checkpoint, or None if the run has no whole one.
    """
    passed: list[DamagedCheckpoint] = []
    newest, outcome = None, "no other one is left"
    for path in listed(run_dir / FOLDER):
        try:
            outcome = f"using step {verify(path).step}"
        except DamagedCheckpoint as error:
            passed.append(error)
        else:
            newest = path
            break
    for damage in passed:
        report(f"{damage.path} is damaged ({damage.reason}): {outcome}")
    return newest


def resolve(resume: str, run_dir: Path, report: Callable[[str], None]) -> Path | None:
    """The checkpoint that ``--resume`` means.

    Args:
        resume: "auto" (the newest whole checkpoint of ``run_dir``), or the path of a checkpoint or
            a run.
        report: as in ``latest``.

    Returns:
        The checkpoint, or None if ``resume`` is "auto" and nothing was saved yet.

    Raises:
        UserError: there is no checkpoint at the path, or there are only damaged ones.
    """
    if resume == "auto":
        return _newest(run_dir, report)
    path = Path(resume)
    choices = "give a checkpoint, a run folder or auto"
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"--resume {path}: {what}; {choices}")
    if (path / MANIFEST).exists() or NAME.fullmatch(path.name):
        return path
    newest = _newest(path.parent if path.name == FOLDER else path, report)
    if newest is None:
        raise UserError(f"--resume {path}: no checkpoint there; {choices}")
    return newest


def _newest(run_dir: Path, report: Callable[[str], None]) -> Path | None:
    newest = latest(run_dir, report)
    if newest is None and listed(run_dir / FOLDER):
        raise UserError(
            f"{run_dir / FOLDER}: every checkpoint is damaged; remove the folder to begin anew"
        )
    return newest


def listed(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first. A displaced one comes after its successor."""
    paths = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=lambda path: (step_of(path), path.suffix != DISPLACED), reverse=True)


def folder_of(run_dir: Path, step: int) -> Path:
    """Folder of a run's checkpoint after ``step`` updates."""
    return run_dir / FOLDER / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.removesuffix(DISPLACED).removeprefix("step-"))


def seems_whole(path: Path) -> bool:
    """Whether all files exist and have the right size; their content is not read."""
    try:
        for name, entry in _manifest(path).files.items():
            _check_size(path, name, entry)
    except DamagedCheckpoint:
        return False
    return True


def sha256(path: Path) -> str:
    """Digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint folder")
    with _damage(path, MANIFEST):
        text = (path / MANIFEST).read_bytes()
    try:
        return Manifest.from_json(text)
    except ValueError as error:
        raise DamagedCheckpoint(path, f"{MANIFEST}: {error}") from error


def _check_size(path: Path, name: str, entry: FileEntry) -> None:
    with _damage(path, name):
        size = (path / name).stat().st_size
    if size != entry.size:
        raise DamagedCheckpoint(path, f"{name}: {size} bytes, {entry.size} were written")


@contextmanager
def _damage(path: Path, name: str) -> Iterator[None]:
    """Raises DamagedCheckpoint for an error of reading the file inside."""
    try:
        yield
    except OSError as error:
        raise DamagedCheckpoint(path, f"{name}: {error.strerror or error}") from error
    except UserError as error:
        raise DamagedCheckpoint(path, str(error)) from error
