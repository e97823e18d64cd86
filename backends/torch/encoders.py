"""The encoder that a spec names."""

from triptych.backends.torch.resnet import ResNet
from triptych.backends.torch.vit import VisionTransformer
from triptych.core.config.spec import ModelSpec, VitSpec


def encoder(spec: ModelSpec) -> VisionTransformer | ResNet:
    """Images (N, C, H, W) -> features (N, D); ``tokens`` gives all positions."""
    return VisionTransformer(spec) if isinstance(spec, VitSpec) else ResNet(spec)
