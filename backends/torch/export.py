"""Writes a network as ONNX with PyTorch's own exporter (``torch.onnx``)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from triptych.backends.torch.engine import Engine
from triptych.core.methods import exported

OPSET = 18
"""Version of ONNX's operators, the one that the exporter writes without conversion."""
MAX_FILE = 1_900_000_000
"""Bytes of weights that fit into one file, since ONNX's limit is 2 GiB."""


class Exported(exported.Exported, nn.Module):
    """What the file computes (see ``core.methods.exported.Exported``)."""


def write(engine: Engine, branch: str, path: Path, names: Sequence[str], *, logits: bool) -> None:
    """Writes a network in evaluation mode, for any number of images.

    Args:
        engine: holds the network, in float32 on the CPU.
        branch: "student" or "teacher".
        path: of the file, ``*.onnx``. Weights beyond ``MAX_FILE`` go to ``*.onnx.data`` beside it.
        names: of the outputs.
        logits: whether the outputs are the logits of the classifiers; else the features.
    """
    network = Exported(engine.model, branch, logits=logits).eval()
    spec = engine.spec.model
    torch.onnx.export(
        network,
        # Two images: the exporter takes a size of 1 for a constant.
        (torch.zeros(2, spec.channels, *spec.size),),
        path,
        input_names=["images"],
        output_names=names,
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("number")},),
        external_data=sum(p.nbytes for p in network.state_dict().values()) > MAX_FILE,
        verbose=False,
    )
