"""Encoders for other image sizes and other numbers of channels."""

from collections.abc import Mapping

import numpy as np

from triptych.core.config.spec import ModelSpec, VitSpec
from triptych.core.contracts import Array
from triptych.core.errors import UserError
from triptych.core.files.tree import Stored
from triptych.core.formats.positions import Way, resample

FIRST = ("conv1.weight", "patch_embed.proj.weight", "patch_embed.proj.0.weight")
"""Names of the first layer of an encoder. A file has one of them."""
TABLES = ("encoder.pos_embed", "decoder.pos_embed")


def adapted_channels(weight: Array, channels: int) -> Array:
    """The weights of a first layer for images with another number of channels.

    The convention is that of timm. One channel gets the sum of the weights, so that a grey image
    gives what its colour copy gives. More channels repeat the weights in order and scale them by
    the ratio of the numbers, so that the outputs keep their size.

    Args:
        weight: (out, in, kh, kw).
        channels: of the new images.

    Returns:
        (out, channels, kh, kw) in the type of ``weight``; float16 is computed in float32.
    """
    wide = weight.astype(np.float32) if weight.dtype.itemsize < 4 else weight
    before = weight.shape[1]
    if channels == 1:
        new = wide.sum(axis=1, keepdims=True)
    else:
        repeats = -(-channels // before)
        new = np.tile(wide, (1, repeats, 1, 1))[:, :channels]
        new = new * np.array(before / channels, wide.dtype)
    result: Array = new.astype(weight.dtype)
    return result


def adapted(
    tensors: Mapping[str, Stored], before: ModelSpec, after: ModelSpec, way: Way | None
) -> dict[str, tuple[Stored, str]]:
    """The canonical tensors that another image size or number of channels changes.

    Args:
        tensors: by canonical name.
        before: the model of the tensors.
        after: the wanted model.
        way: to resample position tables; None: there is none.

    Returns:
        name -> (tensor, what was done).

    Raises:
        UserError: the position tables must change and ``way`` is None.
    """
    changed: dict[str, tuple[Stored, str]] = {}
    if before.channels != after.channels:
        for name, tensor in tensors.items():
            if name.partition(".encoder.")[2] in FIRST:
                values = adapted_channels(tensor.array(), after.channels)
                changed[name] = Stored.of(values), f"{before.channels} to {after.channels} channels"
    if isinstance(before, VitSpec) and isinstance(after, VitSpec) and before.grid != after.grid:
        for name, tensor in tensors.items():
            if name.endswith(TABLES):
                if way is None:
                    raise UserError(
                        f"--image-size: {name} has a grid of {before.grid[0]}x{before.grid[1]} "
                        f"patches, and {after.grid[0]}x{after.grid[1]} are wanted; give "
                        "--positions bicubic, bicubic_antialias or dino"
                    )
                values = resample(tensor.array(), before.grid, after.grid, way)
                changed[name] = Stored.of(values), f"resized ({way})"
    return changed
