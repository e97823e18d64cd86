"""Residual network with torchvision's names, of any width, with a stem for large or small images.

Shape letters: N images, L positions of a map, D channels.
"""

from collections.abc import Sequence

import paddle
from paddle import Tensor, nn

from triptych.backends.paddle.layers import BatchNorm, Conv2D, max_pool, relu_
from triptych.core import parameters
from triptych.core.config.spec import ResnetSpec
from triptych.core.methods.networks import run
from triptych.core.parameters import ConvNorm, ResidualBlock


class Block(nn.Layer):
    """Two or three convolutions, each with a norm, added to the input. (N, D, H, W)."""

    def __init__(self, spec: ResidualBlock) -> None:
        super().__init__()
        self.bottleneck = len(spec.layers) == 3
        self.conv1, self.bn1 = _conv_norm(spec.layers[0])
        self.conv2, self.bn2 = _conv_norm(spec.layers[1])
        if self.bottleneck:
            self.conv3, self.bn3 = _conv_norm(spec.layers[2])
        self.downsample = nn.Sequential(*_conv_norm(spec.shortcut)) if spec.shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        """Applies ReLU between the layers, and after the sum."""
        y = relu_(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.bottleneck:
            y = self.bn3(self.conv3(relu_(y)))
        return relu_(y.add_(self.downsample(x) if self.downsample else x))


class ResNet(nn.Layer):
    """torchvision's network without its classifier. Parameters have torchvision's names."""

    def __init__(self, spec: ResnetSpec) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(parameters.stem(spec))
        self.large = spec.stem == "imagenet"
        blocks = list(parameters.blocks(spec))
        for i in range(len(spec.depths)):
            stage = [Block(block) for block in blocks if block.stage == i]
            self.add_sublayer(f"layer{i + 1}", nn.Sequential(*stage))

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
        # A mean over two axes has a slow gradient. Pooling divides its gradient by a float32.
        return x.flatten(2).mean(-1)

    def _stem(self, images: Tensor) -> Tensor:
        x = relu_(self.bn1(self.conv1(images)))
        return max_pool(x) if self.large else x


def _conv_norm(layer: ConvNorm) -> tuple[Conv2D, BatchNorm]:
    shape = (layer.fan_in, layer.fan_out, layer.kernel, layer.stride, layer.padding)
    return Conv2D(*shape, bias=False), BatchNorm(layer.fan_out)


def _with_mean(x: Tensor) -> Tensor:
    """The mean over positions, then the positions. (N, D, H, W) -> (N, 1+L, D)."""
    positions = x.flatten(2).transpose([0, 2, 1])
    return paddle.concat([positions.mean(1, keepdim=True), positions], axis=1)
