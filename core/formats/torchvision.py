"""torchvision's residual networks."""

from triptych.core.formats.format import Format
from triptych.core.formats.single import RESNET_CLASSIFIER, RESNET_ENCODER

FORMAT = Format(
    name="torchvision",
    about="torchvision",
    layouts=(RESNET_CLASSIFIER, RESNET_ENCODER),
)
