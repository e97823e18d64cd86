"""``core.contracts.MocaModel`` in NumPy."""

from dataclasses import replace
from typing import cast

import autograd.numpy as np

from triptych.core import parameters
from triptych.core.config.spec import MocaSpec, RunSpec, VitSpec
from triptych.core.contracts import ALONE, Index, Tensor
from triptych.core.methods import ring
from triptych.core.reference.encoders import block, masked_vit, vit
from triptych.core.reference.layers import Norms, batch_norm, layer_norm, linear, relu
from triptych.core.reference.ops import l2_normalize


class Moca:
    """The parts of MOCA that other methods do not have.

    Args:
        spec: of the run.
        values: every tensor by its canonical name.
    """

    head_norms: dict[str, Norms]

    def __init__(self, spec: RunSpec, values: dict[str, Tensor]) -> None:
        self.values = values
        self.vit, self.method = cast(VitSpec, spec.model), cast(MocaSpec, spec.method)
        self.grid = self.vit.grid

    def teacher_tokens(self, images: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return vit(self.values, "teacher.encoder", images, self.vit)["final"][:, 1:]

    def encode(self, images: Tensor, ids: Index) -> tuple[Tensor, Tensor]:
        """See ``core.contracts.MocaModel``."""
        outputs = masked_vit(self.values, "student.encoder", images, ids, self.vit)
        early = self.method.early_layer
        return outputs[-2 - early] if early else outputs[-1], outputs[-1]

    def decode(self, image: Tensor, early: Tensor, ids: Index) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        values, name = self.values, "student.decoder"
        spec = parameters.decoder_spec(self.vit, self.method)
        visible = layer_norm(values, f"{name}.early_norm", early[:, 1:], spec.layer_norm_eps)
        x = linear(values, f"{name}.embed", np.concatenate([image[:, None], visible], axis=1))
        masked = (len(ids), ids.shape[1] - visible.shape[1], 1)
        x = np.concatenate([x, np.tile(values[f"{name}.mask_token"], masked)], axis=1)
        table = values[f"{name}.pos_embed"][0]
        first = np.zeros((len(ids), 1), np.int64)  # the place of the class token
        x = x + table[np.concatenate([first, ids + 1], axis=1)]
        for i in range(spec.depth):
            x = block(values, f"{name}.blocks.{i}", x, spec)
        x = layer_norm(values, f"{name}.norm", x, spec.layer_norm_eps)
        return np.reshape(x[:, 1:], (-1, spec.width))

    def image_weights(self, words: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self._weights("student.image_predictor", words)

    def dense_weights(self, words: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self._weights("student.dense_predictor", words)

    def _weights(self, name: str, words: Tensor) -> Tensor:
        values = self.values
        x = l2_normalize(words, eps=1e-5)
        hidden = linear(values, f"{name}.hidden", x)
        # The words form the batch of the batch norm. They are equal on all processes.
        norms = replace(self.head_norms["student"], group=ALONE.norms)
        hidden = relu(batch_norm(values, f"{name}.norm", hidden, norms))
        skip = linear(values, f"{name}.skip", x) if f"{name}.skip.weight" in values else x
        rows = l2_normalize(skip + linear(values, f"{name}.last", hidden), eps=1e-5)
        return values[f"{name}.scale"] * rows


class Codebook:
    """Implements ``core.contracts.Codebook`` with the tensors under ``memory.``."""

    update = ring.update

    def __init__(self, values: dict[str, Tensor]) -> None:
        self._values = values

    @property
    def words(self) -> Tensor:
        """See ``core.contracts.Codebook``."""
        return self._values["memory.words"]

    @property
    def distance(self) -> Tensor:
        """See ``core.contracts.Codebook``."""
        return self._values["memory.distance"]

    @property
    def distance_used(self) -> Tensor:
        """See ``core.contracts.Codebook``."""
        return self._values["memory.distance_used"]

    @property
    def pointer(self) -> int:
        """See ``core.contracts.Codebook``."""
        return int(self._values["memory.pointer"])

    @pointer.setter
    def pointer(self, row: int) -> None:
        """See ``core.contracts.Codebook``."""
        self._values["memory.pointer"] = np.array(row)

    @property
    def updates(self) -> int:
        """See ``core.contracts.Codebook``."""
        return int(self._values["memory.updates"])

    @updates.setter
    def updates(self, count: int) -> None:
        """See ``core.contracts.Codebook``."""
        self._values["memory.updates"] = np.array(count)
