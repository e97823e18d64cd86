"""How each system computes its encoders: the names and layouts that its forward pass uses.

A converter compares the features by these statements (``core.formats.forward``) with those of the
converted encoder. So they repeat what the tables of names say, and use nothing of it.

Shape letters: H heads, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SINGLE = {"student": ""}
"""The prefixes of a file with one encoder."""

TIMM = {
    "class token": "cls_token",
    "positions": "pos_embed",
    "patches": "patch_embed.proj",
    "first norm": "blocks.{i}.norm1",
    "query, key, value": "blocks.{i}.attn.qkv",
    "attention": "blocks.{i}.attn.proj",
    "second norm": "blocks.{i}.norm2",
    "hidden": "blocks.{i}.mlp.fc1",
    "output": "blocks.{i}.mlp.fc2",
    "last norm": "norm",
    "norm of the mean": "fc_norm",
}
"""Names of the parts of a ViT in timm."""


PADDLE_STATISTICS = ("_mean", "_variance")
"""Names of running mean and running variance in Paddle."""


@dataclass(frozen=True)
class Vit:
    """A vision transformer.

    Attributes:
        prefixes: branch -> prefix of the names of its encoder.
        names: of the parts that are not called as in timm (``TIMM``), with ``{i}`` for the number
            of a block. With "separate", "query", "key" and "value" are parts.
        linear: order of the values of a matrix. "out_in": y = x W^T + b; "in_out": y = x W + b.
        qkv: order of the outputs of query, key and value. "joined": (3, H, D/H). "interleaved":
            (H, 3, D/H). "separate": three matrices.
        statistics: names of running mean and running variance in the norms of a stem.
    """

    prefixes: Mapping[str, str] = field(default_factory=lambda: SINGLE)
    names: Mapping[str, str] = field(default_factory=dict)
    linear: Literal["out_in", "in_out"] = "out_in"
    qkv: Literal["joined", "interleaved", "separate"] = "joined"
    statistics: tuple[str, str] = ("running_mean", "running_var")

    def first(self, branch: str) -> str:
        """A name that files with this encoder have."""
        return self.prefixes[branch] + {**TIMM, **self.names}["class token"]


@dataclass(frozen=True)
class Resnet:
    """A residual network.

    Attributes:
        prefixes: branch -> prefix of the names of its encoder.
        stem: names of the first convolution and its norm.
        stages: names of the four stages.
        norm: the name of the norm of convolution ``{i}`` of a block, with the dot before it.
        shortcut: names of the convolution and the norm of a block's shortcut.
        statistics: names of running mean and running variance.
    """

    prefixes: Mapping[str, str] = field(default_factory=lambda: SINGLE)
    stem: tuple[str, str] = ("conv1", "bn1")
    stages: tuple[str, ...] = ("layer1", "layer2", "layer3", "layer4")
    norm: str = ".bn{i}"
    shortcut: tuple[str, str] = (".downsample.0", ".downsample.1")
    statistics: tuple[str, str] = ("running_mean", "running_var")

    def first(self, branch: str) -> str:
        """A name that files with this encoder have."""
        return f"{self.prefixes[branch]}{self.stem[0]}.weight"


Arithmetic = Vit | Resnet


def networks(*prefixes: Mapping[str, str]) -> tuple[Arithmetic, ...]:
    """ViTs and ResNets under the names of timm and torchvision, with each of these prefixes."""
    return tuple(kind(prefix) for prefix in prefixes for kind in (Vit, Resnet))
