"""Our own names in a file of PyTorch, for ``torch.load(weights_only=True)``."""

from triptych.core.files.tree import Node
from triptych.core.formats.canonical import ARITHMETIC, STATE
from triptych.core.formats.format import Format, Output


def output(made: Output) -> tuple[str, Node]:
    """One dictionary of tensors."""
    return "torch", {**made.tensors, **made.optimizer}


FORMAT = Format(
    name="torch",
    about="our own names, for torch.load",
    layouts=(STATE,),
    containers=("torch zip", "torch legacy"),
    arithmetic=ARITHMETIC,
    output=output,
)
