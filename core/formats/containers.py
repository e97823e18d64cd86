"""Opens files and folders of weights of any system."""

from pathlib import Path

from triptych.core.files import oneflow, reading
from triptych.core.files.tree import Content
from triptych.core.formats.format import AVERAGED, PLAIN

ARRAYS = {".npz": "npz", ".safetensors": "safetensors"}
"""Endings of files that hold arrays and nothing else."""


def open_content(path: Path) -> Content:
    """The content of a file or folder of any system.

    Args:
        path: a file of npz, safetensors, PyTorch, Paddle or detectron2, or a folder of OneFlow,
            LiBai, PaddleFleetX or Hugging Face.

    Raises:
        UserError: the path is unreadable, damaged, or names something to run.
    """
    return reading.read(path)


def is_foreign_folder(path: Path) -> bool:
    """Whether a folder holds weights that another system saved."""
    folders = (path, path / "model")
    files = (path / name for name in (oneflow.LAST, *PLAIN, *AVERAGED))
    return any(map(oneflow.is_folder, folders)) or any(file.is_file() for file in files)
