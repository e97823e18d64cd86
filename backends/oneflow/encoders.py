"""Builds encoders."""

from triptych.backends.oneflow.resnet import ResNet
from triptych.backends.oneflow.vit import VisionTransformer
from triptych.core.config.spec import ModelSpec, VitSpec


def encoder(spec: ModelSpec) -> VisionTransformer | ResNet:
    """Builds the encoder of the section ``model``. It maps (N, C, H, W) to (N, D)."""
    return VisionTransformer(spec) if isinstance(spec, VitSpec) else ResNet(spec)
