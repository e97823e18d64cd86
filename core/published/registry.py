"""Published weights by name, from the table ``weights.yaml`` beside this file."""

import difflib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

TABLE = Path(__file__).with_name("weights.yaml")
DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")
"""The ending of a file's name that torchvision and mmengine give: a dash, and the first digits of
the file's sha256."""


class Digest(NamedTuple):
    """What is known of a file's hash.

    Attributes:
        algorithm: its name in ``hashlib``.
        prefix: first hexadecimal digits.
    """

    algorithm: str
    prefix: str


class Weights(NamedTuple):
    """A published file of weights.

    Attributes:
        recipe: the recipe that has the file's model and method.
        format: whose names its tensors have.
        address: where the file is.
        md5: the first hexadecimal digits of its MD5, where its authors give them.
    """

    recipe: str
    format: str
    address: str
    md5: str = ""

    @property
    def file(self) -> str:
        """The file's name."""
        return self.address.rpartition("/")[2]

    @property
    def digest(self) -> Digest | None:
        """What is known of the file's hash; None: nothing."""
        if self.md5:
            return Digest("md5", self.md5)
        found = DIGEST_IN_NAME.search(self.file)
        return Digest("sha256", found[1]) if found else None


@cache
def table() -> dict[str, Weights]:
    """Name for ``get_model(weights=…)``, ``--weights`` and ``init.weights`` -> the file."""
    entries = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {name: Weights(**entry) for name, entry in entries.items()}


def hint(name: str) -> str:
    """The known name that is most like ``name``, in brackets for a message; or nothing."""
    near = difflib.get_close_matches(name, table(), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
