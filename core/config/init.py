"""The ``init`` section: pretrained weights to start from."""

from typing import Literal

from triptych.core.config.fields import Bool, Section, Str


class InitSpec(Section):
    """Where the encoder's first weights come from. All other tensors have their initial values."""

    weights: Str | None = None
    """A run or checkpoint folder, or a file of PyTorch, Paddle, safetensors or npz, or a folder of
    OneFlow, or the name of published weights (tools/info.py weights); null: initial values."""
    branch: Literal["student", "teacher"] = "student"
    """The encoder to take, if the file has two."""
    average: Bool | None = None
    """Whether to take averaged weights (EMA) instead of those that were trained. null: the file has
    only one of them."""
    allow_missing: tuple[Str, ...] = ()
    """Tensors of the encoder that the file may lack, by canonical name without student.encoder. in
    front. They keep their initial values. A name that ends in . stands for all that begin with
    it."""
    allow_unused: tuple[Str, ...] = ()
    """Tensors that the file may have beyond the encoder, such as the classifier of an unknown
    format, by their names in the file. A name that ends in . stands for all that begin with it."""
    positions: Literal["exact", "bicubic", "bicubic_antialias", "dino"] = "exact"
    """A position table of another grid of patches. exact: an error. Else the table is resampled.
    bicubic: as in MAE and MOCA. bicubic_antialias: as in timm. dino: as in DINO, whose sampling
    step is not quite that of the grids."""
    channels: Literal["exact", "adapted"] = "exact"
    """A first layer for another number of channels. exact: an error. adapted: as in timm: one
    channel gets the sum of the weights; more channels repeat them in order, scaled by the ratio of
    the numbers."""
