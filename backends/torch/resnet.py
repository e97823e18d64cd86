"""Residual network with torchvision's names, of any width, with a stem for large or small images.

Shape letters: N images, L positions of a map, D channels.
"""

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from triptych.backends.torch.layers import BatchNorm, taking_turns
from triptych.backends.torch.maps import Conv2d
from triptych.core import parameters
from triptych.core.config.spec import ResnetSpec
from triptych.core.methods.residual import Residual
from triptych.core.parameters import ConvNorm, ResidualBlock


class ResNet(Residual, nn.Module):
    """torchvision's network without its classifier. Parameters have torchvision's names.

    Tensors are channels first, and virtual ranks contiguous, until ``hasten`` is called.
    """

    turns = 1
    """Number of virtual ranks whose images alternate inside (see ``BatchNorm``)."""
    channels_last = False
    """Whether the channels of tensors inside are neighbours in memory."""

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

    def hasten(self, *, last: bool) -> None:
        """Arranges tensors in the order that is faster. The last digits change.

        Args:
            last: channels last: faster in 16 bits and on the CPU (see ``maps``). Otherwise virtual
                ranks alternate.
        """
        if last:
            self.channels_last = True
            self.to(memory_format=torch.channels_last)
            return
        self.turns = self.bn1.virtual_ranks
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.alternating = self.turns > 1

    def stem(self, images: Tensor) -> Tensor:
        """See ``core.methods.residual.Residual``."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        elif self._takes_turns(images):
            images = taking_turns(images, self.turns)
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))

    def mean(self, x: Tensor) -> Tensor:
        """See ``core.methods.residual.Residual``."""
        return self._in_order(x.mean((2, 3)))

    def with_mean(self, x: Tensor) -> Tensor:
        """See ``core.methods.residual.Residual``."""
        positions = self._in_order(x).flatten(2).mT
        return torch.cat([positions.mean(1, keepdim=True), positions], dim=1)

    def _in_order(self, x: Tensor) -> Tensor:
        """The images in the order in which they came."""
        return taking_turns(x, len(x) // self.turns) if self._takes_turns(x) else x

    def _takes_turns(self, images: Tensor) -> bool:
        """Whether the images alternate: not in the last batch of an epoch, if that is uneven."""
        return self.training and self.turns > 1 and not len(images) % self.turns


def _block(spec: ResidualBlock) -> nn.Module:
    """torchvision's block. Its network class, which has one width, is not used."""
    kind = resnet.Bottleneck if len(spec.layers) == 3 else resnet.BasicBlock
    inner, stride = spec.layers[0].fan_out, max(layer.stride for layer in spec.layers)
    downsample = None
    if spec.shortcut:
        downsample = nn.Sequential(_conv(spec.shortcut), BatchNorm(spec.shortcut.fan_out))
    block = kind(spec.layers[0].fan_in, inner, stride, downsample, norm_layer=BatchNorm)
    for i, layer in enumerate(spec.layers, 1):
        if layer.kernel == 1:
            setattr(block, f"conv{i}", _conv(layer))
    return block


def _conv(layer: ConvNorm) -> Conv2d:
    return Conv2d(
        layer.fan_in, layer.fan_out, layer.kernel, layer.stride, layer.padding, bias=False
    )
