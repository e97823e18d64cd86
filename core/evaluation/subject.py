"""The features that a protocol evaluates, and where they come from."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np

from triptych.core.config.spec import RunSpec, VitSpec
from triptych.core.contracts import Array
from triptych.core.engine import Engine
from triptych.core.errors import UserError
from triptych.core.evaluation.row import RAW_PIXELS

Check = Callable[[], None]


def never() -> None:
    """A check that never breaks an evaluation off."""


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
        branch: "student", "teacher" or "none".
        tokens: which features of the encoder, or "raw pixels".
        check: called between batches; it raises an exception to break the evaluation off.
        final_norm: as in ``Choice``.
        blocks: as in ``Choice``.
        interpolation: as in ``Choice``.
    """

    embed: Callable[[Array], Array]
    step: int
    branch: str
    tokens: str
    check: Check = never
    final_norm: bool = True
    blocks: int = 1
    interpolation: str | None = None

    @property
    def choice(self) -> Choice:
        """The features of an encoder that these are."""
        return Choice(self.branch, self.tokens, self.final_norm, self.blocks, self.interpolation)


def depth(spec: RunSpec) -> int:
    """Number of an encoder's blocks; of a ResNet its stages."""
    return spec.model.depth if isinstance(spec.model, VitSpec) else 4


def encoder(
    engine: Engine,
    step: int,
    *,
    branch: str,
    tokens: str,
    check: Check = never,
    final_norm: bool = True,
    blocks: int = 1,
    interpolation: str | None = None,
) -> Subject:
    """The features of an engine's encoder.

    Args:
        branch: as in ``core.engine.Engine.embed``.
        tokens: as in ``core.engine.Engine.embed``.
        check: as in ``Subject``.
        final_norm: as in ``Choice``.
        blocks: as in ``Choice``.
        interpolation: as in ``Choice``.

    Raises:
        UserError: the encoder has fewer blocks.
    """
    names = Choice(branch, tokens, final_norm, blocks).arrays(depth(engine.spec))
    layers = () if final_norm else tuple(int(name.removeprefix("layer")) for name in names)

    def embed(images: Array) -> Array:
        outputs = engine.embed(images, branch=branch, layers=layers, tokens=tokens)
        return outputs[names[0]] if len(names) == 1 else np.hstack([outputs[n] for n in names])

    return Subject(embed, step, branch, tokens, check, final_norm, blocks, interpolation)


def alone(engine: Engine, step: int, choice: Choice) -> Subject:
    """The features of an engine that holds the encoder of ``choice.branch`` alone.

    Args:
        engine: of ``core.launch.open_encoder``.

    Raises:
        UserError: as in ``encoder``.
    """
    held = replace(choice, branch="student")
    return replace(encoder(engine, step, **asdict(held)), branch=choice.branch)


def raw_pixels() -> Subject:
    """The normalised pixels as features, a baseline for every encoder."""

    def flatten(images: Array) -> Array:
        return images.reshape(len(images), -1)

    return Subject(flatten, 0, "none", RAW_PIXELS)
