"""torchvision's residual networks: bare state dicts."""

from triptych.core.files.tree import Node
from triptych.core.formats.arithmetic import SINGLE, networks
from triptych.core.formats.format import Format, Output
from triptych.core.formats.single import RESNET_CLASSIFIER, RESNET_ENCODER


def _output(output: Output) -> tuple[str, Node]:
    """The state dict that ``load_state_dict`` takes."""
    return "torch", output.tensors


FORMAT = Format(
    name="torchvision",
    about="torchvision",
    layouts=(RESNET_CLASSIFIER, RESNET_ENCODER),
    arithmetic=networks(SINGLE),
    output=_output,
)
