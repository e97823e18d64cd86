"""The features that a protocol evaluates, and where they come from."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from triptych.core.config.spec import RunSpec, VitSpec
from triptych.core.contracts import Array
from triptych.core.engine import Engine
from triptych.core.errors import UserError
from triptych.core.evaluation.row import RAW_PIXELS
from triptych.core.evaluation.sharing import Sharing

Check = Callable[[], None]
Product = Callable[[Array, Array], Array]


def never() -> None:
    """A check that never breaks an evaluation off."""


def on_host(a: Array, b: Array) -> Array:
    """The products of all rows. (M, D) float32, (N, D) float32 -> (M, N) float32."""
    product: Array = a @ b.T
    return product


@dataclass(frozen=True)
class Choice:
    """The features of an encoder that a protocol evaluates.

    Attributes:
        branch: "student" or "teacher".
        tokens: "cls" or "mean", as in ``core.engine.Engine.embed``.
        final_norm: True: the output after the last norm. False: the raw output of the last blocks.
        blocks: number of last blocks (in a ResNet: stages) to concatenate, the earliest first.
            With ``final_norm`` it is 1.
        interpolation: "bilinear" or "bicubic", of the images; None: ``augment.eval_interpolation``.
    """

    branch: str
    tokens: str
    final_norm: bool = True
    blocks: int = 1
    interpolation: str | None = None

    def arrays(self, depth: int) -> tuple[str, ...]:
        """The names in the result of ``Engine.embed`` to concatenate.

        Args:
            depth: number of the encoder's blocks or stages.

        Raises:
            UserError: the encoder has fewer blocks.
        """
        if self.blocks > depth:
            raise UserError(
                f"evaluate.lowshot.blocks: {self.blocks}: the encoder has only {depth}; lower it"
            )
        if self.final_norm:
            return ("final",)
        return tuple(f"layer{block}" for block in range(depth - self.blocks, depth))


@dataclass(frozen=True)
class Subject:
    """Frozen features of one kind.

    Attributes:
        embed: (N, C, H, W) normalised images -> (N, D) features.
        step: optimizer steps that trained the weights.
        choice: which features these are. ``branch`` is "none" and ``tokens`` is "raw pixels" for
            features of no encoder.
        check: called between batches; it raises an exception to break the evaluation off.
        sharing: the processes that compute the features together.
        product: products of rows as ``on_host`` gives them, up to the order of the sums.
    """

    embed: Callable[[Array], Array]
    step: int
    choice: Choice
    check: Check = never
    sharing: Sharing = field(default_factory=Sharing)
    product: Product = on_host

    @property
    def branch(self) -> str:
        """As in ``choice``."""
        return self.choice.branch

    @property
    def tokens(self) -> str:
        """As in ``choice``."""
        return self.choice.tokens


def depth(spec: RunSpec) -> int:
    """Number of an encoder's blocks; of a ResNet its stages."""
    return spec.model.depth if isinstance(spec.model, VitSpec) else 4


def encoder(engine: Engine, step: int, choice: Choice, check: Check = never) -> Subject:
    """The features of an engine's encoder.

    Args:
        check: as in ``Subject``.

    Raises:
        UserError: the encoder has fewer blocks.
    """
    names = choice.arrays(depth(engine.spec))
    layers = () if choice.final_norm else tuple(int(n.removeprefix("layer")) for n in names)

    def embed(images: Array) -> Array:
        outputs = engine.embed(images, branch=choice.branch, layers=layers, tokens=choice.tokens)
        return outputs[names[0]] if len(names) == 1 else np.hstack([outputs[n] for n in names])

    return Subject(embed, step, choice, check, Sharing(engine), product_of(engine))


def product_of(engine: Engine) -> Product:
    """The products of the engine's backend, on its device; with TF32, ``on_host``.

    Whoever needs these products knows how far sums of float32 are from the true ones. Those of TF32
    are further off.
    """
    if engine.spec.precision == "tf32":
        return on_host

    def by_backend(a: Array, b: Array) -> Array:
        with engine.ops.no_grad():
            product = engine.ops.matmul(engine.tensor(a), engine.tensor(b), transpose_b=True)
        return engine.array(product).astype(np.float32, copy=False)

    return by_backend


def alone(engine: Engine, step: int, choice: Choice) -> Subject:
    """The features of an engine that holds the encoder of ``choice.branch`` alone.

    Args:
        engine: of ``core.launch.open_encoder``.

    Raises:
        UserError: as in ``encoder``.
    """
    held = replace(choice, branch="student")
    return replace(encoder(engine, step, held), choice=choice)


def raw_pixels() -> Subject:
    """The normalised pixels as features, a baseline for every encoder."""

    def flatten(images: Array) -> Array:
        return images.reshape(len(images), -1)

    return Subject(flatten, 0, Choice("none", RAW_PIXELS))
