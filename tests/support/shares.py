"""The images of one copy of the model, of a batch that a test has made as a whole."""

from collections.abc import Mapping

from triptych.core.contracts import Array, Batch, Group, Partners, evenly
from triptych.core.methods import mixing


def share(batch: Batch, draws: Mapping[str, Array], replicas: Group) -> Batch:
    """The part of a copy, with the partners of other copies that its images are mixed with."""
    size = len(batch.index)
    rows = evenly(size, replicas.rank, replicas.count)
    part = batch.part(rows)
    if "mix_partner" not in draws or replicas.count == 1:
        return part
    others = mixing.missing(mixing.first(draws, size)["mix_partner"], rows)
    partners = Partners(batch.views[0][others], batch.labels[others], others)
    return Batch(part.views, part.index, part.labels, None, part.first, part.size, partners)
