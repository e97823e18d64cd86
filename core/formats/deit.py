"""DeiT (facebookresearch/deit), and the encoders that MoCo v3 exports for it.

The names are timm's. A training file has averaged weights beside the plain ones. A distilled DeiT
has a second token, ``dist_token``, with a row of its own in the position table, and a classifier
for it. No ViT here has that token, and the features of the others depend on it.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from triptych.core.contracts import Array
from triptych.core.files.tree import Content, Node, Stored
from triptych.core.formats.arithmetic import Vit
from triptych.core.formats.format import Format, Output, Place, places
from triptych.core.formats.single import VIT_CLASSIFIER, VIT_ENCODER

TABLE, ROW = "pos_embed", "pos_embed.dist_token"
"""The position table, and the name that its row for the second token gets here."""


def _places(content: Content) -> Iterator[Place]:
    """The state dicts. The row of the second token is a tensor of its own."""
    for spot in places(content):
        tensors = spot.tensors
        table = tensors.get(TABLE)
        if "dist_token" in tensors and table is not None and len(table.shape) == 3:
            tensors = {**tensors, TABLE: _without(table), ROW: _row(table)}
        yield spot._replace(tensors=tensors)


def _without(table: Stored) -> Stored:
    one, rows, width = table.shape
    return table.changed((one, rows - 1, width), lambda bits: np.delete(bits, 1, axis=1))


def _row(table: Stored) -> Stored:
    return table.changed((table.shape[0], 1, table.shape[2]), lambda bits: bits[:, 1:2])


def _output(output: Output) -> tuple[str, Node]:
    """A file with one entry, as DeiT publishes it."""
    tensors = dict(output.tensors)
    row, table = tensors.pop(ROW, None), tensors.get(TABLE)
    if row is not None and table is not None:
        shape = (table.shape[0], table.shape[1] + 1, table.shape[2])
        tensors[TABLE] = table.changed(shape, lambda bits: _joined(bits, row.bits()))
    return "torch", {"model": tensors}


def _joined(table: Array, row: Array) -> Array:
    return np.concatenate([table[:, :1], row, table[:, 1:]], axis=1)


DISTILLED = replace(
    VIT_CLASSIFIER,
    about="a distilled DeiT with a second token",
    kind="distilled",
    marks=("dist_token",),
    methods=(),
    beside=("dist_token", ROW, "head_dist.{leaf}"),
)

FORMAT = Format(
    name="deit",
    about="DeiT (facebookresearch/deit)",
    layouts=(VIT_CLASSIFIER, VIT_ENCODER, DISTILLED),
    keys=frozenset({"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args"}),
    places=_places,
    constants={"model.layer_norm_eps": 1e-6},
    arithmetic=(Vit(),),
    output=_output,
)
