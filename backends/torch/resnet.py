"""Residual network: torchvision's, of any width, and with a stem for small images too.

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


class ResNet(resnet.ResNet):
    """torchvision's module without its classifier; parameters keep torchvision's names.

    In PyTorch's own order of dimensions: with channels last the convolutions are a sixth faster on
    the CPU, but the float32 statistics of the norms lose two digits.
    """

    def __init__(self, spec: ResnetSpec) -> None:
        # Not torchvision's own, which has one width, and draws initial values; they come with the
        # state. Its stages are made by the method that it makes them with, from these attributes.
        nn.Module.__init__(self)
        self._norm_layer = BatchNorm
        self.inplanes, self.groups, self.base_width, self.dilation = spec.width, 1, 64, 1
        stem = parameters.stem(spec)
        self.conv1 = nn.Conv2d(
            stem.fan_in, stem.fan_out, stem.kernel, stem.stride, stem.padding, bias=False
        )
        self.bn1 = BatchNorm(spec.width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if spec.stem == "imagenet" else nn.Identity()
        block = resnet.Bottleneck if spec.bottleneck else resnet.BasicBlock
        for i, depth in enumerate(spec.depths):
            stage = self._make_layer(block, spec.width * 2**i, depth, stride=2 if i else 1)
            self.add_module(f"layer{i + 1}", stage)

    def tokens(self, images: Tensor, layers: Sequence[int] = ()) -> dict[str, Tensor]:
        """See ``core.contracts.Encoder``."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        x, kept = run(self._stem(images), stages, layers)
        return {"final": _with_mean(x), **{f"layer{i}": _with_mean(y) for i, y in kept.items()}}

    def forward(self, images: Tensor) -> Tensor:
        """The last map's mean over positions. (N, C, H, W) -> (N, D)."""
        x = self._stem(images)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))

    def _stem(self, images: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))


def _with_mean(x: Tensor) -> Tensor:
    """(N, D, H, W) -> (N, 1+L, D)."""
    positions = x.flatten(2).mT
    return torch.cat([positions.mean(1, keepdim=True), positions], dim=1)
