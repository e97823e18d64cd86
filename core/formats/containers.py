"""Takes the state dict out of a file of any system.

Such a file often holds much more: an epoch, arguments, the optimizer. Only the tensors of one
dictionary are used, and nothing in the file is run.
"""

from pathlib import Path

import numpy as np

from triptych.core.contracts import Array, State
from triptych.core.errors import UserError, printable
from triptych.core.files import oneflow, reading
from triptych.core.files.arrays import read_file
from triptych.core.files.tree import Content, Node, Record, Stored

ARRAYS = (".npz", ".safetensors")
"""Endings of files that hold arrays and nothing else."""

KEYS = (
    *("state_dict", "model", "module", "target_encoder"),
    *("state_dict_ema", "model_ema"),
    *("model.pdparams", "model.safetensors", "pytorch_model.bin"),
)
"""Names under which files and folders hold a state dict. The second line names averaged weights,
the third one the files of PaddleFleetX and Hugging Face."""

SHOWN = 8
"""Number of entries that a message lists."""


def read_state_dict(path: Path) -> State:
    """The named arrays of a file or folder of any system.

    Args:
        path: a file of npz, safetensors, PyTorch, Paddle or detectron2, or a folder of OneFlow,
            LiBai, PaddleFleetX or Hugging Face.

    Returns:
        The arrays in memory. float16 and bfloat16 are widened to float32, except that float16 of
        npz and safetensors stays.

    Raises:
        UserError: the path is unreadable, damaged, or names something to run; or it holds no state
            dict, or more than one, or matrices in the layout of Paddle.
    """
    if path.suffix in ARRAYS:
        return read_file(path)
    content = reading.read(path)
    if content.container in ("npz", "safetensors"):
        return read_file(path)
    found = _state_dict(content)
    _check_layout(path, found)
    return {name: _array(stored) for name, stored in found.items()}


def is_foreign_folder(path: Path) -> bool:
    """Whether a folder holds weights that another system saved."""
    folders = (path, path / "model")
    files = (path / name for name in (oneflow.LAST, *KEYS))
    return any(map(oneflow.is_folder, folders)) or any(file.is_file() for file in files)


def _state_dict(content: Content) -> dict[str, Stored]:
    tree = content.tree if isinstance(content.tree, dict) else {}
    found = {f"{key!r}": _tensors(tree[key]) for key in KEYS if key in tree}
    # A number beside the state dict, such as the best accuracy, has a name without a dot.
    flat = _tensors(tree)
    if any("." in name for name in flat):
        found["the top level"] = flat
    found = {place: tensors for place, tensors in found.items() if tensors}
    path = printable(str(content.path))
    if not found:
        raise UserError(
            f"{path}: {content.container}: no state dict under {', '.join(KEYS)} or at the top "
            f"level; it holds {_listed(content.tree)}; save the model's state dict alone"
        )
    if len(found) > 1:
        raise UserError(
            f"{path}: {content.container}: {len(found)} state dicts, {', '.join(found)}; save the "
            "one that is meant alone"
        )
    return next(iter(found.values()))


def _check_layout(path: Path, found: dict[str, Stored]) -> None:
    """Refuses transposed matrices by name. Shapes tell them where one matrix is not square."""
    for name, stored in found.items():
        if name.endswith("attn.qkv.weight") and stored.shape[1:] == (3 * stored.shape[0],):
            raise UserError(
                f"{printable(str(path))}: {name} {stored.shape}: matrices are (in, out), as Paddle "
                "has them; only (out, in) is read: transpose them, and save the state dict anew"
            )


def _tensors(node: Node) -> dict[str, Stored]:
    """The tensors directly in a dictionary. Other entries are no weights."""
    if not isinstance(node, dict) or isinstance(node, Record):
        return {}
    return {str(name): value for name, value in node.items() if isinstance(value, Stored)}


def _listed(tree: Node) -> str:
    if not isinstance(tree, dict):
        return f"a {type(tree).__name__}"
    names = [printable(str(name)[:60]) for name in tree]
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join([*names[:SHOWN], *more]) or "nothing"


def _array(stored: Stored) -> Array:
    """The values in memory of their own, since the file may change later."""
    values = stored.array()
    wide = np.dtype(np.float32) if values.dtype == np.float16 else values.dtype
    return np.array(values, wide, order="C")
