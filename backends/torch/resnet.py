"""Residual network with torchvision's names, of any width, with a stem for large or small images.

Shape letters: N images, L positions of a map, D channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from triptych.backends.torch.layers import BatchNorm
from triptych.core import parameters
from triptych.core.config.spec import ResnetSpec
from triptych.core.methods.networks import run
from triptych.core.parameters import ConvNorm, ResidualBlock


class ResNet(nn.Module):
    """torchvision's network without its classifier. Parameters have torchvision's names.

    Tensors are channels first. With channels last the convolutions are a sixth faster on the CPU,
    but the float32 statistics of the norms lose two digits.
    """

    def __init__(self, spec: ResnetSpec) -> None:
        super().__init__()
        self.conv1 = _conv(parameters.stem(spec))
        self.bn1 = BatchNorm(spec.width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if spec.stem == "imagenet" else nn.Identity()
        blocks = list(parameters.blocks(spec))
        for i in range(len(spec.depths)):
            stage = [_block(block) for block in blocks if block.stage == i]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))

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
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))

    def _stem(self, images: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))


def _block(spec: ResidualBlock) -> nn.Module:
    """torchvision's block. Its network class, which has one width, is not used."""
    kind = resnet.Bottleneck if len(spec.layers) == 3 else resnet.BasicBlock
    inner, stride = spec.layers[0].fan_out, max(layer.stride for layer in spec.layers)
    downsample = None
    if spec.shortcut:
        downsample = nn.Sequential(_conv(spec.shortcut), BatchNorm(spec.shortcut.fan_out))
    return kind(spec.layers[0].fan_in, inner, stride, downsample, norm_layer=BatchNorm)


def _conv(layer: ConvNorm) -> nn.Conv2d:
    return nn.Conv2d(
        layer.fan_in, layer.fan_out, layer.kernel, layer.stride, layer.padding, bias=False
    )


def _with_mean(x: Tensor) -> Tensor:
    """The mean over positions, then the positions. (N, D, H, W) -> (N, 1+L, D)."""
    positions = x.flatten(2).mT
    return torch.cat([positions.mean(1, keepdim=True), positions], dim=1)
