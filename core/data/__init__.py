"""Data: sources of images, augmentation, and batches that are pure functions of the step."""

from triptych.core.data.classes import require_labels
from triptych.core.data.decode import DamagedImage
from triptych.core.data.jobs import epoch_order
from triptych.core.data.levels import few_levels
from triptych.core.data.names import class_names
from triptych.core.data.open import Splits, open_evaluation, open_splits, open_train
from triptych.core.data.pipeline import (
    Pipeline,
    augmented_views,
    evaluation_batches,
    indexed_batches,
    labels_of,
    nothing_readable,
    shared_batches,
)
from triptych.core.data.source import Source, split_digest
from triptych.core.data.subset import Subset

__all__ = [
    "DamagedImage",
    "Pipeline",
    "Source",
    "Splits",
    "Subset",
    "augmented_views",
    "class_names",
    "epoch_order",
    "evaluation_batches",
    "few_levels",
    "indexed_batches",
    "labels_of",
    "nothing_readable",
    "open_evaluation",
    "open_splits",
    "open_train",
    "require_labels",
    "shared_batches",
    "split_digest",
]
