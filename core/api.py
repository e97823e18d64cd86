"""Encoders for use from Python: a recipe's name in, features out.

from triptych.core import get_model, list_models
model = get_model("moco_v3/digits", backend="torch", weights="runs/demo/torch")
features = model.encode(images)
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from triptych.core import config, formats
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array
from triptych.core.data import evaluation_batches
from triptych.core.data.decode import MODES, Decoding, decode, decoding, to_mode
from triptych.core.data.source import UNLABELLED
from triptych.core.engine import Engine
from triptych.core.errors import UserError, printable
from triptych.core.launch import choose_backend, open_engine, quiet

Images = Array | Sequence[Image.Image | str | Path]
"""What ``Encoder.encode`` takes."""


@dataclass(frozen=True)
class Encoder:
    """An encoder on a backend, and the recipe that says how its images are prepared."""

    spec: RunSpec
    engine: Engine

    def encode(
        self, images: Images, *, branch: str = "student", tokens: str = "cls", batch_size: int = 64
    ) -> Array:
        """Features of images, in evaluation mode.

        Args:
            images: one of

                - Pillow images or paths of image files,
                - a uint8 array (N, H, W) or (N, H, W, C),
                - a floating array (N, C, H, W), normalised and of the model's size.

                Images of the first two kinds may have any size. They are resized, cut and
                normalised as in the recipe's evaluations.
            branch: "student" or "teacher".
            tokens: "cls" (N, D), "mean" of the patch tokens (N, D), or "all" (N, 1+L, D).
            batch_size: number of images embedded at once.

        Returns:
            Features in the run's precision, in the order of the images.

        Raises:
            UserError: there are no images, their shape does not fit, or a file is damaged.
        """
        if not len(images):
            raise UserError("encode: no images")
        if isinstance(images, np.ndarray) and images.dtype.kind == "f":
            batches = self._ready(images, batch_size)
        else:
            batches = self._prepared(images, batch_size)
        parts = [
            self.engine.embed(batch, branch=branch, tokens=tokens)["final"] for batch in batches
        ]
        return np.concatenate(parts)

    def _ready(self, images: Array, batch_size: int) -> list[Array]:
        wanted = (self.spec.model.channels, *self.spec.model.size)
        if images.shape[1:] != wanted:
            raise UserError(
                f"encode: floating images of shape {images.shape}, expected (N, {wanted[0]}, "
                f"{wanted[1]}, {wanted[2]}), normalised; give uint8 or Pillow images of any size"
            )
        return [images[i : i + batch_size] for i in range(0, len(images), batch_size)]

    def _prepared(self, images: Images, batch_size: int) -> list[Array]:
        data = self.spec.data.model_copy(update={"workers": 0, "on_error": "stop"})
        spec = self.spec.model_copy(update={"data": data})
        source = _Images(images, decoding(spec.data))
        warned: dict[str, str] = {}
        batches = [b for b, _ in evaluation_batches(spec, source, batch_size, warned=warned)]
        for name, text in warned.items():
            warnings.warn(f"{printable(name)}: {printable(text)}", stacklevel=3)
        return batches


def list_models(pattern: str = "*") -> list[str]:
    """Names for ``get_model``: recipes, and mmpretrain's names for them.

    Args:
        pattern: a shell's wildcard pattern, e.g. ``"*vit-small*"``.
    """
    names = [*config.recipes(), *config.ALIASES]
    return [name for name in names if fnmatchcase(name, pattern)]


def get_model(
    name: str | Path,
    backend: str | None = None,
    weights: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
) -> Encoder:
    """The encoder of a recipe.

    Args:
        name: one of ``list_models()``, or the path of a spec.
        backend: None: the spec's backend, else the first installed one.
        weights: a run or checkpoint folder, or an npz or safetensors file of a known format;
            None: the initial values from the spec's seed.
        overrides: ``a.b=c`` each, as on the command line.

    Raises:
        UserError: there is no such recipe or backend, or the weights do not fit the model exactly.
    """
    spec = config.load(name, overrides)
    state = formats.load_weights(Path(weights), spec) if weights else formats.initial_state(spec)
    backend = choose_backend(backend, spec, quiet)
    return Encoder(spec, open_engine(spec, backend, state))


def inference_model(
    model: str | Path | Encoder, image: Image.Image | Array | str | Path, **options: Any
) -> dict[str, Array]:
    """The features of one image. A pretrained encoder has no classes to predict.

    Args:
        model: an encoder, or a name as for ``get_model``.
        image: a Pillow image, the path of an image file, or uint8 (H, W) or (H, W, C).
        options: further arguments of ``get_model``.

    Returns:
        "features": (D,).

    Raises:
        UserError: as in ``get_model`` and ``Encoder.encode``.
    """
    encoder = model if isinstance(model, Encoder) else get_model(model, **options)
    images = image[None] if isinstance(image, np.ndarray) else [image]
    return {"features": encoder.encode(images)[0]}


class _Images:
    """Images given by the caller, as a source; see ``core.data.Source``."""

    classes: tuple[str, ...] = ()

    def __init__(self, images: Images, how: Decoding) -> None:
        self._images, self._how = images, how
        if isinstance(images, np.ndarray):
            channels = images.shape[3] if images.ndim == 4 else 1
            if images.dtype != np.uint8 or images.ndim not in (3, 4) or channels not in MODES:
                raise UserError(
                    f"encode: {images.dtype} images of shape {images.shape}, expected uint8 "
                    "(N, H, W) or (N, H, W, C) with 1 to 4 channels, or floating (N, C, H, W)"
                )

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        image = self._images[index]
        if isinstance(image, str | Path):
            return decode(str(image), self._how)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
        if not isinstance(image, Image.Image) or not all(image.size):
            raise UserError(
                f"encode: {self.name(index)}: no pixels; give a Pillow image, the path of an image "
                "file, or a uint8 array"
            )
        try:
            return to_mode(image, self._how)
        except UserError as error:
            raise UserError(f"encode: {self.name(index)}: {error}; convert it") from error

    def label(self, index: int) -> int:
        return UNLABELLED

    def name(self, index: int) -> str:
        image = self._images[index]
        return str(image) if isinstance(image, str | Path) else f"images[{index}]"

    key = name
