"""Residual network with torchvision's names, of any width, with a stem for large or small images.

Shape letters: N images, L positions of a map, D channels.
"""

import paddle
from paddle import Tensor, nn

from triptych.backends.paddle.layers import BatchNorm, Conv2D, max_pool, relu_
from triptych.core import parameters
from triptych.core.config.spec import ResnetSpec
from triptych.core.methods.residual import Residual
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


class ResNet(Residual, nn.Layer):
    """torchvision's network without its classifier. Parameters have torchvision's names."""

    def __init__(self, spec: ResnetSpec) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(parameters.stem(spec))
        self.large = spec.stem == "imagenet"
        blocks = list(parameters.blocks(spec))
        for i in range(len(spec.depths)):
            stage = [Block(block) for block in blocks if block.stage == i]
            self.add_sublayer(f"layer{i + 1}", nn.Sequential(*stage))

    def stem(self, images: Tensor) -> Tensor:
        """See ``core.methods.residual.Residual``."""
        x = relu_(self.bn1(self.conv1(images)))
        return max_pool(x) if self.large else x

    def mean(self, x: Tensor) -> Tensor:
        """See ``core.methods.residual.Residual``."""
        # A mean over two axes has a slow gradient. Pooling divides its gradient by a float32.
        return x.flatten(2).mean(-1)

    def with_mean(self, x: Tensor) -> Tensor:
        """See ``core.methods.residual.Residual``."""
        positions = x.flatten(2).transpose([0, 2, 1])
        return paddle.concat([positions.mean(1, keepdim=True), positions], axis=1)


def _conv_norm(layer: ConvNorm) -> tuple[Conv2D, BatchNorm]:
    shape = (layer.fan_in, layer.fan_out, layer.kernel, layer.stride, layer.padding)
    return Conv2D(*shape, bias=False), BatchNorm(layer.fan_out)
