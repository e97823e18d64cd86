"""Published files on this machine: downloaded once, checked each time they are used."""

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from triptych.core.errors import UserError, printable
from triptych.core.files import reading
from triptych.core.files.caching import alone, cache_folder
from triptych.core.files.download import Advance, download, forget
from triptych.core.files.writing import sync
from triptych.core.published.registry import Digest, Weights

CHUNK = 1 << 20
"""Bytes hashed at a time."""


def place(weights: Weights) -> Path:
    """Where the file of published weights is on this machine, or will be."""
    return cache_folder() / "weights" / weights.file


def fetch(name: str, weights: Weights) -> Path:
    """The file of published weights, downloaded if it is not here.

    The file appears under its name only when it is whole and checked. A download that was broken
    off is continued. Messages and the progress bar go to standard error.

    Args:
        name: of the weights, for messages.
        weights: their entry of the table.

    Raises:
        UserError: the file cannot be had, or is not the published one. The message says where a
            file that was downloaded by other means is to be put.
    """
    path = place(weights)
    if not path.is_file():
        with alone(path, lambda: _say(f"{name}: another process downloads it; waiting")):
            if not path.is_file():
                _download(name, weights, path)
                return path
    if problem := _problem(path, weights.digest):
        raise UserError(f"{printable(str(path))}: {problem}; remove the file to download it anew")
    return path


def _download(name: str, weights: Weights, path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    _say(f"{name}: downloading {weights.address} to {path}")
    try:
        with _bar(name) as advance:
            download(weights.address, part, advance)
        problem = _problem(part, weights.digest)
        if not problem and weights.digest is None:
            problem = _unreadable(part)
        if problem:
            forget(part)
            raise UserError(f"{weights.address}: {problem}; nothing was kept")
    except UserError as error:
        raise UserError(
            f"{name}: {error}; download {weights.address} by other means and save it as "
            f"{printable(str(path))}"
        ) from error
    sync(part)
    os.replace(part, path)
    forget(part)


def _problem(path: Path, digest: Digest | None) -> str:
    """Why a file is not the published one; empty: it is, or nothing is known of its hash."""
    if digest is None:
        return ""
    own = hashlib.new(digest.algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            own.update(piece)
    if own.hexdigest().startswith(digest.prefix):
        return ""
    return (
        f"not the published file: its {digest.algorithm} is {own.hexdigest()}, that of the "
        f"published one begins with {digest.prefix}"
    )


def _unreadable(path: Path) -> str:
    """Why a file of unknown hash holds no weights; empty: it does."""
    try:
        reading.read(path)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


@contextmanager
def _bar(name: str) -> Iterator[Advance]:
    """A progress bar, if standard error is a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"),
        *columns,
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(name, total=None)
        yield lambda here, total: progress.update(task, completed=here, total=total)


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
