"""Saving, finding and loading the state of a run; reading weights that came from elsewhere."""

from triptych.core.checkpoint.manifest import Manifest, check_spec, stamp_warnings, versions
from triptych.core.checkpoint.retrieval import (
    DamagedCheckpoint,
    latest,
    read,
    resolve,
    verify,
)
from triptych.core.checkpoint.store import refuse_non_finite, write
from triptych.core.formats.loading import FORMATS, load_weights, read_arrays

__all__ = [
    "FORMATS",
    "DamagedCheckpoint",
    "Manifest",
    "check_spec",
    "latest",
    "load_weights",
    "read",
    "read_arrays",
    "refuse_non_finite",
    "resolve",
    "stamp_warnings",
    "verify",
    "versions",
    "write",
]
