"""Saves, finds and loads the state of a run."""

from triptych.core.checkpoint.manifest import Manifest, check_spec, stamp_warnings, versions
from triptych.core.checkpoint.retrieval import (
    DamagedCheckpoint,
    folder_of,
    latest,
    read,
    resolve,
    verify,
)
from triptych.core.checkpoint.store import refuse_non_finite, write
from triptych.core.checkpoint.trial import sizes, try_out

__all__ = [
    "DamagedCheckpoint",
    "Manifest",
    "check_spec",
    "folder_of",
    "latest",
    "read",
    "refuse_non_finite",
    "resolve",
    "sizes",
    "stamp_warnings",
    "try_out",
    "verify",
    "versions",
    "write",
]
