"""Writes an encoder as an ONNX file, through the exporter of its framework."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from triptych import backends
from triptych.core import parameters
from triptych.core.api import Encoder
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array
from triptych.core.engine import Engine
from triptych.core.errors import UserError
from triptych.core.random import stream

LARGEST = 1e-4
"""Largest difference between the outputs of file and encoder, relative to the largest value."""
BATCHES = (1, 3)
"""Numbers of images with which the file is compared."""


class Export(NamedTuple):
    """A written file.

    Attributes:
        path: of the file.
        outputs: their names. The input is ``images``: (N, C, H, W) float32, normalised.
        difference: largest difference to the encoder's own outputs, relative to the largest value;
            None: onnxruntime is not installed, so nothing was compared.
    """

    path: Path
    outputs: tuple[str, ...]
    difference: float | None


def export(model: Encoder, path: str | Path, *, branch: str | None = None) -> Export:
    """Writes an encoder as ONNX: its features, or the logits of its classifiers if it has some.

    The file takes any number of images and computes in float32. It replaces an earlier one when it
    is whole. If onnxruntime is installed, its outputs are compared with those of the encoder.

    Args:
        model: on PyTorch or Paddle.
        path: of the file, ``*.onnx``. Weights of more than 2 GiB lie in ``*.onnx.data`` beside it.
        branch: "student" or "teacher"; None: as in ``Encoder.encode`` and ``Encoder.predict``.

    Raises:
        UserError: the backend has no exporter, or a package of it is missing; the path has another
            ending or cannot be written; or the file computes something else.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise UserError(f"export: {path}: expected a name that ends in .onnx")
    exporter = backends.exporter(model.backend)
    averaged = parameters.parts(model.spec).teacher == "everything"
    spec = model.spec.model_copy(update={"precision": "float32", "device": "cpu"})
    whole = Encoder(spec, model.backend, model.weights)
    engine, held = whole.engine(branch or ("teacher" if averaged else "student"))
    logits = spec.method.labelled
    expected = [(images, _outputs(engine, held, images, logits)) for images in _batches(spec)]
    names = tuple(expected[0][1])
    try:
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            file = Path(folder) / path.name
            exporter.write(engine, held, file, names, logits=logits)
            difference = _difference(file, expected)
            if difference is not None and not difference <= LARGEST:
                raise UserError(
                    f"export: {path}: the outputs differ by {difference:.1e} from the encoder's, "
                    f"relative to the largest value; at most {LARGEST:.0e} is rounding"
                )
            for written in sorted(Path(folder).iterdir(), reverse=True):  # weights, then network
                os.replace(written, path.parent / written.name)
    except OSError as error:
        raise UserError(f"export: {path}: cannot write: {error.strerror}") from error
    return Export(path, names, difference)


def _batches(spec: RunSpec) -> list[Array]:
    """Images of noise: (1, C, H, W) and (3, C, H, W) float32."""
    shape = (spec.model.channels, *spec.model.size)
    return [
        stream(0, "export", count).standard_normal((count, *shape)).astype(np.float32)
        for count in BATCHES
    ]


def _outputs(engine: Engine, branch: str, images: Array, logits: bool) -> dict[str, Array]:
    """The encoder's own outputs, under their names in the file."""
    if not logits:
        return {"features": engine.embed(images, branch=branch)["final"]}
    scores = engine.classify(images, branch=branch)
    return {f"logits{i}" if len(scores) > 1 else "logits": each for i, each in enumerate(scores)}


def _difference(file: Path, expected: Sequence[tuple[Array, dict[str, Array]]]) -> float | None:
    """Largest relative difference of the file's outputs; None: nothing here can run the file."""
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    errors = []
    for images, outputs in expected:
        found = session.run(list(outputs), {"images": images})
        for ours, theirs in zip(outputs.values(), found, strict=True):
            errors.append(np.abs(theirs - ours).max() / (np.abs(ours).max() or 1.0))
    return float(np.max(errors))  # NaN if one of them is
