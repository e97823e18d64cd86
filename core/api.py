"""Encoders for use from Python: a recipe's name in, features or classes out.

from triptych.core import get_model, list_models
model = get_model("moco_v3/digits", backend="torch", weights="runs/demo/torch")
features = model.encode(images)
classes = get_model("moco_v3/digits_linear", weights="runs/probe").predict(images)
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from triptych.core import config, formats, parameters, published
from triptych.core.config.spec import RunSpec, SupervisedSpec
from triptych.core.contracts import Array, State
from triptych.core.data import evaluation_batches, open_splits
from triptych.core.data.decode import MODES, Decoding, decode, decoding, to_mode
from triptych.core.data.names import class_names
from triptych.core.data.source import UNLABELLED
from triptych.core.engine import Engine
from triptych.core.errors import UserError, printable
from triptych.core.evaluation.subject import depth
from triptych.core.launch import choose_backend, open_classifier, open_encoder, quiet

Several = Array | Sequence[Image.Image | str | Path]
Images = Several | Image.Image | str | Path
"""What ``Encoder.encode`` takes."""


@dataclass(frozen=True)
class Prediction:
    """The classes that a classifier finds most likely for one image, the most likely first.

    Attributes:
        labels: positions of the classes in the list of all classes.
        scores: probabilities, 0 to 1.
        names: names of the classes.
    """

    labels: tuple[int, ...]
    scores: tuple[float, ...]
    names: tuple[str, ...]


class Encoder:
    """An encoder on a backend, and the recipe that says how its images are prepared.

    An encoder of a self-supervised method is built alone, without teacher, heads and optimizer. The
    other branch is loaded when it is first asked for. Probed and fine-tuned encoders come with
    their classifier.

    Attributes:
        spec: of the recipe.
        backend: its name.
        weights: as in ``get_model``.
    """

    def __init__(self, spec: RunSpec, backend: str, weights: Path | None = None) -> None:
        """Loads the student.

        Args:
            weights: as in ``get_model``.

        Raises:
            UserError: as in ``get_model``.
        """
        self.spec, self.backend = spec, backend
        self.weights = weights
        self._engines: dict[str, Engine] = {}
        self.engine("student")

    def engine(self, branch: str) -> tuple[Engine, str]:
        """The engine that holds a branch, and the name of the branch in that engine."""
        whole = self.spec.method.labelled
        key = "" if whole else branch
        if key not in self._engines:
            state = self.state()
            self._engines[key] = (
                open_classifier(self.spec, self.backend, state)
                if whole
                else open_encoder(self.spec, self.backend, state, branch)
            )
        return self._engines[key], branch if whole else "student"

    def state(self) -> State:
        """The canonical tensors of the weights, or of the spec's seed without weights."""
        if self.weights is None:
            return formats.initial_state(self.spec)
        return formats.load_encoders(self.weights, self.spec)

    def encode(
        self, images: Images, *, branch: str = "student", tokens: str = "cls", batch_size: int = 64
    ) -> Array:
        """Features of images, in evaluation mode.

        Args:
            images: one of

                - Pillow images or paths of image files, or a single one,
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
            UserError: there are no images, their shape does not fit, a file is damaged, or the
                method has no such branch.
        """
        return self.encode_layers(images, (), branch=branch, tokens=tokens, batch_size=batch_size)[
            "final"
        ]

    def encode_layers(
        self,
        images: Images,
        layers: Sequence[int],
        *,
        branch: str = "student",
        tokens: str = "cls",
        batch_size: int = 64,
    ) -> dict[str, Array]:
        """As ``encode``, with the raw outputs of blocks.

        Args:
            layers: 0-based indices of blocks (in a ResNet: stages).

        Returns:
            "final", and "layer<i>" for each i in ``layers``; each as in ``encode``.

        Raises:
            UserError: as in ``encode``, or the encoder has no such layer.
        """
        count = depth(self.spec)
        if wrong := [layer for layer in layers if not 0 <= layer < count]:
            raise UserError(f"encode: layer {wrong[0]}: the encoder has layers 0 to {count - 1}")
        engine, held = self.engine(branch)
        parts = [
            engine.embed(batch, branch=held, layers=layers, tokens=tokens)
            for batch in self._batches(images, batch_size)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def predict(
        self,
        images: Images,
        *,
        top: int = 5,
        branch: str | None = None,
        head: int | None = None,
        batch_size: int = 64,
    ) -> list[Prediction]:
        """The most likely classes of images, by the classifier of a probe or a fine-tuned encoder.

        Args:
            images: as in ``encode``.
            top: number of classes for each image; all classes, if there are fewer.
            branch: "student", or "teacher" for the mean of a fine-tuning's weights; None: that
                mean if there is one, which the evaluations judge the run by.
            head: which classifier, if a probe has trained several; None: there is only one.
            batch_size: as in ``encode``.

        Raises:
            UserError: as in ``encode``, or the recipe trains no such classifier.
        """
        probabilities = self._probabilities(images, branch, head, batch_size)
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
        return [
            Prediction(
                tuple(labels.tolist()),
                tuple(scores[labels].tolist()),
                tuple(self.classes[label] for label in labels),
            )
            for labels, scores in zip(order, probabilities, strict=True)
        ]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of a classifier; their numbers, if the data are not here."""
        method = cast(SupervisedSpec, self.spec.method)
        numbers = tuple(map(str, range(method.classes)))
        try:
            labels = open_splits(self.spec, held_out=False).train.classes
            names = class_names(self.spec.data, labels or numbers)
        except UserError:
            return numbers
        return names if len(names) == len(numbers) else numbers

    def _probabilities(
        self, images: Images, branch: str | None, head: int | None, batch_size: int
    ) -> Array:
        """(N, classes) float64."""
        if not self.spec.method.labelled:
            raise UserError(
                f"predict: method {self.spec.method.name} trains no classifier; give a recipe with "
                "method linear or finetune and its weights"
            )
        averaged = parameters.parts(self.spec).teacher == "everything"
        if branch == "teacher" and not averaged:
            raise UserError("predict: branch teacher: the recipe has no mean of weights")
        engine, held = self.engine(branch or ("teacher" if averaged else "student"))
        parts = [engine.classify(b, branch=held) for b in self._batches(images, batch_size)]
        logits = np.concatenate(parts, axis=1).astype(np.float64)
        if head is None and len(logits) == 1:
            head = 0
        if not isinstance(head, int | np.integer) or not 0 <= head < len(logits):
            raise UserError(
                f"predict: head {head}: the recipe has {len(logits)} classifiers; give one of 0 to "
                f"{len(logits) - 1}"
            )
        scores = np.exp(logits[head] - logits[head].max(axis=1, keepdims=True))
        probabilities: Array = scores / scores.sum(axis=1, keepdims=True)
        return probabilities

    def _batches(self, images: Images, batch_size: int) -> list[Array]:
        if isinstance(images, Image.Image | str | Path):
            images = [images]
        if not isinstance(images, np.ndarray | Sequence):
            kind = type(images).__name__
            raise UserError(f"encode: {kind}: give an array, or Pillow images or paths in a list")
        if not len(images):
            raise UserError("encode: no images")
        if isinstance(images, np.ndarray) and images.dtype.kind == "f":
            return self._ready(images, batch_size)
        return self._prepared(images, batch_size)

    def _ready(self, images: Array, batch_size: int) -> list[Array]:
        wanted = (self.spec.model.channels, *self.spec.model.size)
        if images.shape[1:] != wanted:
            raise UserError(
                f"encode: floating images of shape {images.shape}, expected (N, {wanted[0]}, "
                f"{wanted[1]}, {wanted[2]}), normalised; give uint8 or Pillow images of any size"
            )
        if not np.isfinite(images).all():
            raise UserError("encode: floating images with values that are not finite")
        return [images[i : i + batch_size] for i in range(0, len(images), batch_size)]

    def _prepared(self, images: Several, batch_size: int) -> list[Array]:
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
    name: str | Path | None = None,
    backend: str | None = None,
    weights: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
) -> Encoder:
    """The encoder of a recipe.

    Args:
        name: one of ``list_models()``, or the path of a spec; None: the recipe of published
            weights, else the architecture that the file shows. Overrides give what it does not
            show, such as the number of heads.
        backend: None: the spec's backend, else the first installed one.
        weights: a run or checkpoint folder, or a file of a known format: of PyTorch (``.pth``),
            Paddle, safetensors or npz; or the name of published weights, which are downloaded once
            (``tools/info.py weights`` lists them); None: the initial values from the spec's seed.
        overrides: ``a.b=c`` each, as on the command line.

    Raises:
        UserError: there is no such recipe or backend, or the weights do not fit the model exactly.
    """
    spec = _spec(name if name is not None else published.recipe(weights), weights, overrides)
    return Encoder(spec, choose_backend(backend, spec, quiet), Path(weights) if weights else None)


def _spec(
    recipe: str | Path | None, weights: str | Path | None, overrides: Sequence[str]
) -> RunSpec:
    """The spec of a recipe, or without one that of a file."""
    if recipe is None:
        return formats.read_spec(published.local(weights or ""), overrides)
    return config.load(recipe, overrides)


def inference_model(
    model: str | Path | Encoder,
    image: Image.Image | Array | str | Path,
    *,
    branch: str | None = None,
    head: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The class of one image, or its features if the recipe trains no classifier.

    Args:
        model: an encoder, or a name as for ``get_model``.
        image: a Pillow image, the path of an image file, or uint8 (H, W) or (H, W, C).
        branch: as in ``Encoder.predict``; for features "student" or "teacher", and None stands for
            the student.
        head: as in ``Encoder.predict``.
        options: further arguments of ``get_model``.

    Returns:
        "pred_label": position of the most likely class in the list of all classes.
        "pred_score": its probability, 0 to 1.
        "pred_class": its name.
        Without a classifier instead "features": (D,).

    Raises:
        UserError: as in ``get_model`` and ``Encoder.encode``.
    """
    encoder = model if isinstance(model, Encoder) else get_model(model, **options)
    images = image[None] if isinstance(image, np.ndarray) else [image]
    if not encoder.spec.method.labelled:
        return {"features": encoder.encode(images, branch=branch or "student")[0]}
    (found,) = encoder.predict(images, top=1, branch=branch, head=head)
    return {
        "pred_label": found.labels[0],
        "pred_score": found.scores[0],
        "pred_class": found.names[0],
    }


class _Images:
    """Images given by the caller, as a source; see ``core.data.Source``."""

    classes: tuple[str, ...] = ()

    def __init__(self, images: Several, how: Decoding) -> None:
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
