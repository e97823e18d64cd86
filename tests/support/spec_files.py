"""Small spec files, written where a test runs, and what loading them complains about."""

from pathlib import Path

import pytest

from triptych.core import config
from triptych.core.errors import UserError

SMALL = """\
model:
  name: vit
  width: 64
  depth: 2
  heads: 4
method: {name: moco_v3}
train:
  steps: 3
augment:
  mean: [0.5, 0.5, 0.5]
"""


def write(name: str, content: str | bytes) -> str:
    """Writes a file below the working directory; gives its name back."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def complaints(path: str | Path, *overrides: str) -> list[str]:
    """The lines that loading ends with."""
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    return str(caught.value).split("\n")
