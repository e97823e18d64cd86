"""The damaged files, and those that image libraries warn about, that any process of a run meets."""

import json
from collections.abc import Sequence
from typing import Protocol

from triptych.core.evaluation.sharing import Sharing


class Reader(Protocol):
    """What reads the images of this process."""

    @property
    def skipped(self) -> Sequence[str]:
        """Names of the damaged files met so far."""

    @property
    def warned(self) -> Sequence[tuple[str, str]]:
        """(file name, text) of the image libraries' warnings so far."""


class Files:
    """The files that the readers of all processes have met.

    Attributes:
        skipped: names of the damaged files up to the last ``update``.
        warned: file name -> text of a warning, likewise.
    """

    def __init__(self, reader: Reader, sharing: Sharing) -> None:
        self.skipped: dict[str, None] = {}
        self.warned: dict[str, str] = {}
        self._reader, self._sharing = reader, sharing
        self._told = (0, 0)

    def update(self) -> tuple[list[str], list[tuple[str, str]]]:
        """The damaged files and the warnings since the last call. The call waits for all ranks."""
        skipped, warned = self._reader.skipped, self._reader.warned
        own = skipped[self._told[0] :], warned[self._told[1] :]
        self._told = len(skipped), len(warned)
        if not self._sharing.any(any(own)):
            return [], []
        names: dict[str, None] = {}
        texts: dict[str, str] = {}
        for text in self._sharing.texts(json.dumps(own)):
            theirs, told = json.loads(text)
            names |= {name: None for name in theirs if name not in self.skipped}
            texts |= {name: said for name, said in told if name not in self.warned}
        self.skipped |= names
        self.warned |= texts
        return list(names), list(texts.items())
