"""Tries all file operations of a checkpoint in a run's folder before the first step.

Some file systems refuse an operation that only a checkpoint needs, which would show hours after the
start. So each operation is tried once, on small files and on empty files of a checkpoint's size.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

from triptych.core.checkpoint.retrieval import MANIFEST, listed
from triptych.core.checkpoint.store import aside_of, shard_file
from triptych.core.errors import UserError
from triptych.core.files.writing import UNSUPPORTED, remedy, set_mode, sync

TRIAL = ".checkpoints"
"""Folder of the trial; its name makes the tried paths at least as long as a checkpoint's."""
MEGABYTE = 1e6


def sizes(shapes: Mapping[str, tuple[int, ...]], item: int) -> dict[str, int]:
    """Bytes of each file of a checkpoint.

    Args:
        shapes: canonical name -> shape of each tensor of the state.
        item: bytes per value.

    Returns:
        File name -> bytes.
    """
    totals: dict[str, int] = {}
    for name, shape in shapes.items():
        file = shard_file(name)
        totals[file] = totals.get(file, 0) + item * prod(shape)
    return totals


def try_out(
    run_dir: Path, files: Mapping[str, int], keep: int, say: Callable[[str], None] = print
) -> None:
    """Tries all operations of a checkpoint in a run's folder, and leaves nothing behind.

    Args:
        files: file name -> bytes, of the largest checkpoint of the run.
        keep: number of checkpoints that the run keeps.
        say: called with a warning if the folder lacks an operation that only makes a checkpoint
            safer, or has no room for ``keep`` checkpoints.

    Raises:
        UserError: the folder refuses an operation; the message names the remedy.
    """
    trial = run_dir / TRIAL
    shutil.rmtree(trial, ignore_errors=True)  # of a run that was killed
    _warn_of_room(run_dir, sum(files.values()), keep, say)
    try:
        unsafe = _write(run_dir, trial, files)
        with _needed(run_dir, "remove a folder"):
            shutil.rmtree(trial)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    if unsafe:
        say(
            f"warning: {run_dir}: the file system cannot {' or '.join(unsafe)}; the run does "
            "without, and a power cut may cost its newest checkpoint"
        )


def _write(run_dir: Path, trial: Path, files: Mapping[str, int]) -> list[str]:
    """Writes a checkpoint without content; returns the optional operations that failed."""
    final = trial / "step-00000000"
    aside = aside_of(final)
    small = aside / MANIFEST
    with _needed(run_dir, "make a folder"):
        aside.mkdir(parents=True)
    for name, size in files.items():
        with _needed(run_dir, f"write a checkpoint's file of {size / MEGABYTE:.3g} MB"):
            _reserve(aside / name, size)
    with _needed(run_dir, "write a file"):
        small.write_text("{")
        optional = {"sync a file": sync(small), "set access rights": set_mode(small, 0o644)}
    with _needed(run_dir, "append to a file"), small.open("a") as file:
        file.write("}")
    with _needed(run_dir, "rename a file over another one"):
        other = aside / ".other"
        other.write_text("{}")
        os.replace(other, small)
    with _needed(run_dir, "rename a folder"):
        aside.rename(final)
    with _needed(run_dir, "read what was written"):
        if (final / MANIFEST).read_text() != "{}":
            raise OSError(errno.EIO, "the content is another one")
        listed(trial)
    with _needed(run_dir, "sync a folder"):
        optional["sync a folder"] = sync(trial)
    return [what for what, done in optional.items() if not done]


def _reserve(path: Path, size: int) -> None:
    """Allocates a file of ``size`` bytes.

    Nothing else shows a quota or a limit on the size of files.
    """
    with path.open("wb") as file:
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise


def _warn_of_room(run_dir: Path, size: int, keep: int, say: Callable[[str], None]) -> None:
    """Refuses a disk without room for one checkpoint; warns if it has no room for all."""
    try:
        usage = shutil.disk_usage(run_dir)
    except OSError:  # the writing of the files shows what matters
        return
    if not usage.total:  # file systems of object stores give no sizes
        return
    need = f"a checkpoint has {size / MEGABYTE:.3g} MB, free are {usage.free / MEGABYTE:.3g} MB"
    if usage.free < size:
        raise UserError(f"{run_dir}: no room for a checkpoint: {need}; {remedy(errno.ENOSPC)}")
    # While a checkpoint is written, the earlier ones that the run keeps take room, too.
    missing = keep + 1 - len(listed(run_dir / "checkpoints"))
    if usage.free < missing * size:
        say(f"warning: {run_dir}: no room for checkpoint.keep {keep} checkpoints: {need}")


@contextmanager
def _needed(run_dir: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot {what} there: {error.strerror}; {remedy(error.errno)}"
        ) from error
