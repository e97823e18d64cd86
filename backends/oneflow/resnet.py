"""Residual network with torchvision's names, of any width, with a stem for large or small images.

Shape letters: N images, L positions of a map, D channels.
"""

from collections.abc import Sequence

import oneflow as flow
import oneflow.nn.functional as F
from oneflow import Tensor, nn

from triptych.backends.oneflow.layers import BatchNorm, Conv2d
from triptych.backends.oneflow.sums import row_mean
from triptych.core import parameters
from triptych.core.config.spec import ResnetSpec
from triptych.core.methods.networks import run
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
        for i in range(1, self.depth + 1):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            y = norm(conv(F.relu(y) if i > 1 else y))
        return F.relu(y + (self.downsample(x) if self.downsample else x))


class ResNet(nn.Module):
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

    def tokens(self, images: Tensor, layers: Sequence[int] = ()) -> dict[str, Tensor]:
        """See ``core.contracts.Encoder``."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        x, outputs = run(self._stem(images), stages, layers)
        maps = {"final": x, **{f"layer{i}": y for i, y in outputs.items()}}
        return {name: _with_mean(y) for name, y in maps.items()}

    def pooled(
        self, images: Tensor, pooling: str, scales: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> Tensor:
        """See ``core.contracts.Encoder``."""
        return self(images)

    def forward(self, images: Tensor) -> Tensor:
        """The mean of the last map over its positions. (N, C, H, W) -> (N, D)."""
        x = self._stem(images)
        return _mean(self.layer4(self.layer3(self.layer2(self.layer1(x)))))

    def _stem(self, images: Tensor) -> Tensor:
        return self.maxpool(F.relu(self.bn1(self.conv1(images))))


def _conv(layer: ConvNorm) -> Conv2d:
    return Conv2d(
        layer.fan_in, layer.fan_out, layer.kernel, layer.stride, layer.padding, bias=False
    )


def _mean(x: Tensor) -> Tensor:
    """The mean over positions. (N, D, H, W) -> (N, D)."""
    n, width, height, columns = x.shape
    return row_mean(x.reshape(-1, height * columns)).reshape(n, width)


def _with_mean(x: Tensor) -> Tensor:
    """The mean over positions, then the positions. (N, D, H, W) -> (N, 1+L, D)."""
    mean, positions = _mean(x), x.flatten(2).transpose(1, 2)
    return flow.cat([mean.reshape(len(x), 1, -1), positions], dim=1)
