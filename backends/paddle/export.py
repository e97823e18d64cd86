"""Writes a network as ONNX with Paddle's own exporter (``paddle.onnx``, ``paddle2onnx``)."""

from collections.abc import Sequence
from pathlib import Path

import onnx
import paddle
from paddle import nn
from paddle.static import InputSpec

from triptych.backends.paddle.engine import Engine
from triptych.core.methods import exported

OPSET = 18
"""Version of ONNX's operators."""


class Exported(exported.Exported, nn.Layer):
    """What the file computes (see ``core.methods.exported.Exported``)."""


def write(engine: Engine, branch: str, path: Path, names: Sequence[str], *, logits: bool) -> None:
    """Writes a network in evaluation mode, for any number of images.

    Args:
        engine: holds the network, in float32 on the CPU.
        branch: "student" or "teacher".
        path: of the file, ``*.onnx``.
        names: of the outputs.
        logits: whether the outputs are the logits of the classifiers; else the features.
    """
    network = Exported(engine.model, branch, logits=logits)
    network.eval()
    spec = engine.spec.model
    images = InputSpec([None, spec.channels, *spec.size], "float32", "images")
    paddle.onnx.export(network, str(path.with_suffix("")), [images], opset_version=OPSET)
    _name_outputs(path, names)


def _name_outputs(path: Path, names: Sequence[str]) -> None:
    """Gives the outputs their names. The exporter has numbered them."""
    model = onnx.load(path)
    renamed = {output.name: name for output, name in zip(model.graph.output, names, strict=True)}
    for output in model.graph.output:
        output.name = renamed[output.name]
    for node in model.graph.node:
        node.output[:] = [renamed.get(name, name) for name in node.output]
        node.input[:] = [renamed.get(name, name) for name in node.input]
    onnx.save(model, path)
