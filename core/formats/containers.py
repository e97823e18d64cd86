"""Opens files and folders of weights of any system, and checkpoints of our own."""

from pathlib import Path

from triptych.core import published
from triptych.core.checkpoint.manifest import Manifest
from triptych.core.checkpoint.retrieval import FOLDER, MANIFEST, latest, mapped
from triptych.core.errors import UserError
from triptych.core.files import oneflow, reading
from triptych.core.files.tree import Content
from triptych.core.formats.format import AVERAGED, PLAIN

ARRAYS = {".npz": "npz", ".safetensors": "safetensors"}
"""Endings of files that hold arrays and nothing else."""


CHECKPOINT = "checkpoint"
"""Container of a checkpoint of our own."""


def open_weights(path: Path) -> tuple[Manifest | None, Content]:
    """The content of weights, whoever saved them. Values stay in the mapped files.

    Args:
        path: a checkpoint of our own, which is verified, or a run, which stands for its newest
            whole checkpoint; a file of npz, safetensors, PyTorch, Paddle or detectron2; a folder of
            OneFlow, LiBai, PaddleFleetX or Hugging Face; or a name as ``published.local`` takes it.

    Returns:
        The manifest of a checkpoint of our own, or None, and the content.

    Raises:
        UserError: the path is unreadable, damaged, or names something to run.
    """
    path = published.local(path)
    if not is_checkpoint(path):
        return None, reading.read(path)
    folder = path
    if not (path / MANIFEST).is_file():
        messages: list[str] = []
        newest = latest(path, messages.append)
        if newest is None:
            what = "holds no whole checkpoint; give a run, a checkpoint, or what a system has saved"
            raise UserError("\n".join([f"{path}: {what}", *messages]))
        folder = newest
    manifest, tensors = mapped(folder)
    return manifest, Content(path, CHECKPOINT, dict(tensors))


def is_checkpoint(path: Path) -> bool:
    """Whether a path is that of a checkpoint or run folder, and not of another system."""
    if not path.is_dir() or is_foreign_folder(path):
        return False
    own = (path / FOLDER).is_dir() or (path / MANIFEST).exists()
    return own or not any(child.suffix in reading.SUFFIXES for child in path.iterdir())


def is_foreign_folder(path: Path) -> bool:
    """Whether a folder holds weights that another system saved."""
    folders = (path, path / "model")
    files = (path / name for name in (oneflow.LAST, *PLAIN, *AVERAGED))
    return any(map(oneflow.is_folder, folders)) or any(file.is_file() for file in files)
