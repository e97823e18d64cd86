"""Features of images on their way into a file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from triptych.core.contracts import Array
from triptych.core.data import Source
from triptych.core.engine import Engine
from triptych.core.errors import NonFiniteError, printable
from triptych.core.evaluation.sharing import Met, Sharing, shared
from triptych.core.files.features import Append


@dataclass
class Exported:
    """What an export has met so far.

    Attributes:
        images: number of images written.
        skipped: names of the damaged files, which were left out.
        warned: file name -> text of an image library's warning about it.
        shapes: name of an array -> shape of one image's features.
    """

    images: int = 0
    skipped: list[str] = field(default_factory=list)
    warned: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def export(
    engine: Engine,
    halves: Mapping[bool, Source],
    append: Append,
    *,
    tokens: str,
    layers: Sequence[int],
    advance: Callable[[int], None],
) -> Exported:
    """Writes the features of every image, batch by batch. The processes of a run take turns.

    Args:
        engine: of ``core.launch.open_encoder``.
        halves: whether they are held out -> the images.
        append: takes the columns of ``core.files.features``. Every process calls it.
        tokens: as in ``core.engine.Engine.embed``.
        layers: as in ``core.engine.Engine.embed``.
        advance: called with the number of images so far, damaged ones included.

    Raises:
        UserError: a damaged file (see ``data.on_error``), or the file cannot be written.
        NonFiniteError: the features are not finite.
    """
    names = ("final", *(f"layer{number}" for number in layers))

    def compute(images: Array, index: Array) -> list[Array]:
        outputs = engine.embed(images, layers=layers, tokens=tokens)
        for name in names:
            if not np.isfinite(outputs[name]).all():
                raise NonFiniteError(f"features: {name} is not finite; nothing is written")
        return [outputs[name] for name in names]

    done, sharing, before = Exported(), Sharing(engine), 0
    for held_out, source in halves.items():
        met = Met()
        for found, index in shared(engine.spec, source, met, compute, sharing):
            outputs = dict(zip(names, found, strict=True))
            append({**_columns(source, index, held_out), **outputs})
            done.images += len(index)
            done.shapes = {name: values.shape[1:] for name, values in outputs.items()}
            advance(before + int(index.max()) + 1)
        before += len(source)
        done.skipped += met.skipped
        done.warned |= met.warned
    return done


def _columns(source: Source, index: Array, held_out: bool) -> dict[str, Array]:
    positions = [int(position) for position in index]
    return {
        "name": np.array([printable(source.key(position)) for position in positions]),
        "label": np.array([source.label(position) for position in positions], np.int64),
        "held_out": np.full(len(positions), held_out),
    }


def name_width(sources: Sequence[Source]) -> int:
    """Length of the longest name that ``export`` writes."""
    return max(len(printable(s.key(i))) for s in sources for i in range(len(s)))
