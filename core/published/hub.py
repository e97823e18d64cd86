"""Model folders of the Hugging Face Hub: ``hf://owner/name`` or ``hf://owner/name@revision``."""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from triptych.core import __version__
from triptych.core.errors import UserError, printable
from triptych.core.files.reading import SUFFIXES

SCHEME = re.compile(r"hf:/{1,2}")
"""How an address begins. A ``Path`` writes its two slashes as one."""
NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
SAFE = ("*.safetensors", "*.json", "*.yaml")
"""The files of a model; all files of weights come only where there are no safetensors."""


class Address(NamedTuple):
    """A model folder of the Hub.

    Attributes:
        repo: owner/name.
        revision: branch, tag or commit; None: the main branch.
    """

    repo: str
    revision: str | None


def parse(text: str) -> Address | None:
    """The address that a text is; None: the text is none.

    Raises:
        UserError: it begins like an address and goes on otherwise.
    """
    if not SCHEME.match(text):
        return None
    found = NAME.fullmatch(SCHEME.sub("", text, 1))
    if not found:
        raise UserError(f"{printable(text)}: expected hf://owner/name or hf://owner/name@revision")
    return Address(found[1], found[2])


def fetch(address: Address) -> Path:
    """The folder of a model, downloaded by ``huggingface_hub`` into its own cache.

    Raises:
        UserError: the library is missing, there is no such model or network, or it has no weights.
    """
    hub = _library()
    options = {
        "repo_id": address.repo,
        "revision": address.revision,
        "library_name": "triptych",
        "library_version": __version__,
    }
    with _errors_of(address):
        folder = Path(hub.snapshot_download(**options, allow_patterns=list(SAFE)))
        if not any(folder.glob("*.safetensors")):
            patterns = [*SAFE, *(f"*{suffix}" for suffix in SUFFIXES)]
            folder = Path(hub.snapshot_download(**options, allow_patterns=patterns))
    return folder


def upload(folder: Path, address: Address, *, private: bool, message: str) -> str:
    """Uploads a folder as a model, which is made if it does not exist; returns the commit's URL.

    Raises:
        UserError: the library is missing, there is no network, or the user may not write there.
    """
    hub = _library()
    with _errors_of(address):
        hub.create_repo(repo_id=address.repo, private=private, exist_ok=True)
        done = hub.upload_folder(
            repo_id=address.repo,
            folder_path=str(folder),
            revision=address.revision,
            commit_message=message,
        )
    return str(done)


def _library() -> ModuleType:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(
            "hf://: huggingface_hub is not installed; run: pip install 'triptych[hub]'"
        ) from error


@contextmanager
def _errors_of(address: Address) -> Iterator[None]:
    """The library's errors as one line, the first of its own text."""
    errors = importlib.import_module("huggingface_hub.errors")
    # The bases of its HTTP error cover the library for HTTP that it is built on, whichever it is.
    failures = (OSError, ValueError, *errors.HfHubHTTPError.__bases__)
    try:
        yield
    except failures as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = printable(lines[0]) if lines else type(error).__name__
        raise UserError(
            f"hf://{address.repo}: {reason}; check the name, the network and the log-in (hf auth "
            "login)"
        ) from error
