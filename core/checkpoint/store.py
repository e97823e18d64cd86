"""Writes checkpoints, each of which appears whole or not at all.

    run/checkpoints/step-00000100/{manifest.json, student.safetensors, teacher.safetensors, ...}

A checkpoint is written to a temporary folder, synced, and renamed last. So a process that dies at
any moment leaves the earlier checkpoints intact. One process writes to a run at a time.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from triptych.core.checkpoint.manifest import FileEntry, Manifest, TensorEntry, versions
from triptych.core.checkpoint.retrieval import (
    DISPLACED,
    FOLDER,
    MANIFEST,
    folder_of,
    listed,
    seems_whole,
    step_of,
)
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array
from triptych.core.errors import NonFiniteError, UserError
from triptych.core.files.hashing import Beside, Hashed, beside
from triptych.core.files.saving import stream_safetensors
from triptych.core.files.tree import Stored
from triptych.core.files.writing import remedy, sync
from triptych.core.methods.health import first_non_finite

T = TypeVar("T")


def write(
    run_dir: Path,
    step: int,
    state: Mapping[str, Array | Stored],
    spec: RunSpec,
    extra: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Saves the state after ``step`` updates and removes the checkpoints that are too old.

    One tensor after the other is read, in the order of ``file_order``, checked and written.

    Args:
        state: by canonical name. Tensors need not be in memory.
        extra: further values for the manifest. Its "versions" (package -> version) are added to
            those of NumPy, Pillow and triptych.
        keep: number of newest whole checkpoints to keep, this one included.

    Returns:
        The folder of the checkpoint.

    Raises:
        NonFiniteError: a tensor holds infinities or NaNs; no checkpoint was written.
        UserError: the file system refused, e.g. because it is full; earlier checkpoints are intact.
    """
    tensors = {
        name: _checked(name, x if isinstance(x, Stored) else Stored.of(x), step)
        for name, x in state.items()
    }
    folder = run_dir / FOLDER
    final = folder_of(run_dir, step)
    aside = aside_of(final)
    with _refusals(f"save {final}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sync(run_dir)
            _clear(folder)
            aside.mkdir()
            _fill(aside, step, tensors, spec, extra)
            for path in aside.iterdir():
                sync(path)
            sync(aside)
            _put_in_place(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    with _refusals(f"remove old checkpoints in {folder}"):
        _prune(folder, keep, final)
    return final


def _checked(name: str, tensor: Stored, step: int) -> Stored:
    """A tensor whose values are checked when they are read."""

    def bits() -> Array:
        array = tensor.bits()
        if (array.dtype.name, array.shape) != (tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"{name}: {array.dtype} {array.shape}, stated as {tensor}")
        refuse_non_finite({name: array}, f"checkpoint of step {step}")
        return array

    return replace(tensor, bits=bits)


def refuse_non_finite(state: Mapping[str, Array], what: str) -> None:
    """Raises NonFiniteError naming the first tensor with infinities or NaNs."""
    if tensor := first_non_finite(state.items()):
        raise NonFiniteError(f"{what}: {tensor} is not finite")


def aside_of(path: Path) -> Path:
    """Temporary folder in which a checkpoint is written before it is renamed to ``path``."""
    return path.with_name(f".{path.name}.tmp")


def shard_file(name: str) -> str:
    """The file of a tensor: one for each first part of the canonical names, e.g. "student"."""
    return name.partition(".")[0] + ".safetensors"


def file_order(names: Iterable[str]) -> list[str]:
    """The names of tensors in the order in which their files hold them, file by file."""
    return [name for shard in _shards(dict.fromkeys(names)).values() for name in shard]


def _shards(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """File -> its tensors."""
    shards: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        shards.setdefault(shard_file(name), {})[name] = tensor
    return shards


def fill_alone(
    aside: Path, step: int, tensors: Mapping[str, Stored], spec: RunSpec, extra: Mapping[str, Any]
) -> None:
    """Writes a checkpoint outside of a run, one tensor after the other.

    Args:
        aside: of its folder, as ``core.files.saving.whole`` gives it.
        step: number of updates behind the state.
        tensors: by canonical name. They need not be in memory.
        spec: of the run.
        extra: as in ``write``.
    """
    aside.mkdir()
    _fill(aside, step, tensors, spec, extra)


def _stream(path: Path, shard: Mapping[str, Stored], thread: Beside) -> Hashed:
    with closing(Hashed(path, thread)) as file:
        stream_safetensors(file, dict(shard))
    return file


def _fill(
    aside: Path, step: int, tensors: Mapping[str, Stored], spec: RunSpec, extra: Mapping[str, Any]
) -> None:
    """Writes the files of a checkpoint, the manifest last."""
    shards = _shards(tensors)
    with beside() as thread:
        # A file is still hashed while the next one is written.
        written = {file: _stream(aside / file, shard, thread) for file, shard in shards.items()}
        files = {name: FileEntry(sha256=x.sha256(), size=x.size) for name, x in written.items()}
    entries = {
        name: TensorEntry(file=file, dtype=tensor.dtype, shape=list(tensor.shape))
        for file, shard in shards.items()
        for name, tensor in shard.items()
    }
    _seal(aside, _manifest(step, spec, extra, files, entries))


def _manifest(
    step: int,
    spec: RunSpec,
    extra: Mapping[str, Any],
    files: dict[str, FileEntry],
    tensors: dict[str, TensorEntry],
) -> Manifest:
    return Manifest(
        step=step,
        spec=spec.model_dump(mode="json"),
        versions={**versions(), **extra.get("versions", {})},
        extra={key: value for key, value in extra.items() if key != "versions"},
        files=files,
        tensors=tensors,
    )


def _seal(aside: Path, manifest: Manifest) -> None:
    """Writes the manifest, which makes the checkpoint whole. The caller syncs all of it."""
    with open(aside / MANIFEST, "x", encoding="utf-8") as stream:
        stream.write(manifest.to_json())


def _put_in_place(aside: Path, final: Path) -> None:
    displaced = final.with_name(final.name + DISPLACED)
    if final.exists():
        # A folder cannot be replaced in one operation. Between the two renames the displaced
        # folder still counts as a checkpoint.
        final.rename(displaced)
    aside.rename(final)
    sync(final.parent)
    if displaced.exists():
        _remove(displaced)


def _prune(folder: Path, keep: int, new: Path) -> None:
    """Removes checkpoints older than the ``keep`` newest whole ones, ``new`` among these."""
    others = [path for path in listed(folder) if path != new and seems_whole(path)]
    oldest = min(step_of(path) for path in [new, *others[: keep - 1]])
    for path in listed(folder):
        if step_of(path) < oldest:
            _remove(path)


def _remove(path: Path) -> None:
    # Renamed first: a half-removed folder must not look like a damaged checkpoint. On NFS a folder
    # stays while somebody reads a file in it. This stops no run: the next save removes it.
    shutil.rmtree(path.rename(aside_of(path)), ignore_errors=True)


def _clear(folder: Path) -> None:
    """Removes the leftovers of writers that died, and puts displaced checkpoints back."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("step-*" + DISPLACED):
        place = path.with_name(path.name.removesuffix(DISPLACED))
        if place.exists():
            _remove(path)
        else:
            path.rename(place)


@contextmanager
def _refusals(doing: str) -> Iterator[None]:
    """Raises UserError with a remedy for an error of the file system inside."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot {doing}: {reason}; {remedy(error.errno)} (what was saved before is intact)"
        ) from error
