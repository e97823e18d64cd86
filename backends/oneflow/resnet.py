"""Residual network with torchvision's names, of any width, with a stem for large or small images.

Shape letters: N images, L positions of a map, D channels.
"""

import oneflow as flow
import oneflow.nn.functional as F
from oneflow import Tensor, nn

from triptych.backends.oneflow import residual
from triptych.backends.oneflow.layers import BatchNorm, Conv2d
from triptych.backends.oneflow.sums import row_mean
from triptych.core import parameters
from triptych.core.config.spec import ResnetSpec
from triptych.core.methods.residual import Residual
from triptych.core.parameters import ConvNorm, ResidualBlock


class Block(nn.Module):
    """Two or three convolutions, each with a norm, added to the input. (N, D, H, W)."""

    def __init__(self, spec: ResidualBlock) -> None:
        super().__init__()
        self.depth = len(spec.layers)
        for i, layer in enumerate(spec.layers, 1):
            self.add_module(f"conv{i}", _conv(layer))
            self.add_module(f"bn{i}", BatchNorm(layer.fan_out))
        shortcut = spec.shortcut
        self.downsample = (
            nn.Sequential(_conv(shortcut), BatchNorm(shortcut.fan_out)) if shortcut else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Applies ReLU between the layers, and after the sum."""
        y = x
        for i, (conv, norm) in enumerate(self.pairs()[: self.depth]):
            y = norm(conv(F.relu(y) if i > 0 else y))
        return F.relu(y + (self.downsample(x) if self.downsample else x))

    def pairs(self) -> list[tuple[Conv2d, BatchNorm]]:
        """The convolutions, each with its norm. The last one is the shortcut's, if it has one."""
        numbers = range(1, self.depth + 1)
        inner = [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")) for i in numbers]
        return [*inner, tuple(self.downsample)] if self.downsample else inner


class ResNet(Residual, nn.Module):
    """torchvision's network without its classifier. Parameters have torchvision's names."""

    def __init__(self, spec: ResnetSpec) -> None:
        super().__init__()
        self.conv1 = _conv(parameters.stem(spec))
        self.bn1 = BatchNorm(spec.width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if spec.stem == "imagenet" else nn.Identity()
        blocks = list(parameters.blocks(spec))
        for stage in range(len(spec.depths)):
            inside = [Block(block) for block in blocks if block.stage == stage]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*inside))

    def blocks(self) -> list[Block]:
        """The blocks of all stages."""
        return [
            block
            for stage in (self.layer1, self.layer2, self.layer3, self.layer4)
            for block in stage
        ]

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D)."""
        if residual.serve(self, images):
            return residual.pooled(self, images)
        return super().forward(images)

    def stem(self, images: Tensor) -> Tensor:
        """See ``core.methods.residual.Residual``."""
        return self.maxpool(F.relu(self.bn1(self.conv1(images))))

    def mean(self, x: Tensor) -> Tensor:
        """See ``core.methods.residual.Residual``."""
        n, width, height, columns = x.shape
        return row_mean(x.reshape(-1, height * columns)).reshape(n, width)

    def with_mean(self, x: Tensor) -> Tensor:
        """See ``core.methods.residual.Residual``."""
        mean, positions = self.mean(x), x.flatten(2).transpose(1, 2)
        return flow.cat([mean.reshape(len(x), 1, -1), positions], dim=1)


def _conv(layer: ConvNorm) -> Conv2d:
    return Conv2d(
        layer.fan_in, layer.fan_out, layer.kernel, layer.stride, layer.padding, bias=False
    )
