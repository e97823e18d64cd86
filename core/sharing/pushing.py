"""Uploads a model as a folder to the Hugging Face Hub."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from triptych.core import __version__, config
from triptych.core.api import Encoder
from triptych.core.errors import UserError
from triptych.core.files.saving import write
from triptych.core.files.tree import Stored
from triptych.core.published import SPEC, hub
from triptych.core.sharing.card import render
from triptych.core.sharing.model import Model, model_of

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
"""Files of a model folder, beside the resolved spec. Their names are those that the Hub expects."""


def push(
    model: Encoder | str | Path, where: str, *, private: bool = False, message: str = ""
) -> str:
    """Uploads a model with a model card to the Hugging Face Hub.

    ``get_model(weights=where)`` opens it, on every backend. The optimizer's state stays here, and
    of local paths in the spec only the last part is uploaded.

    Args:
        model: an encoder with weights, or the folder of a run, whose evaluations the card shows.
        where: ``hf://owner/name`` or ``hf://owner/name@revision``; made if it does not exist.
        private: whether a new model is visible to its owner alone.
        message: of the commit; empty: one that names the method and the version.

    Returns:
        The commit's URL.

    Raises:
        UserError: the address is none, the model has no weights, or the upload fails.
    """
    address = hub.parse(where)
    if address is None:
        raise UserError(f"push: {where}: expected hf://owner/name or hf://owner/name@revision")
    held = model_of(model)
    message = message or f"{held.spec.method.name} by triptych {__version__}"
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(held, folder, address.repo)
        return hub.upload(folder, address, private=private, message=message)


def model_card(model: Encoder | str | Path, repo: str = "OWNER/NAME") -> str:
    """The text of the README.md that ``push`` uploads.

    Args:
        model: as in ``push``.
        repo: owner/name on the Hub.

    Raises:
        UserError: the folder is no run.
    """
    return render(model_of(model), repo)


def write_folder(model: Model, folder: Path, repo: str) -> None:
    """Writes weights, spec and card of a model into a folder.

    Raises:
        UserError: the model has no weights, they do not fit the spec, or the disk is full.
    """
    state = {name: Stored.of(array) for name, array in model.state().items()}
    write(folder / WEIGHTS, state, "safetensors")
    about = {
        "library_name": "triptych",
        "triptych_version": __version__,
        "model_type": model.spec.model.name,
        "spec": model.spec.model_dump(mode="json"),
    }
    for name, text in (
        (CONFIG, json.dumps(about, indent=2) + "\n"),
        (SPEC, config.dump(model.spec)),
        (CARD, render(model, repo)),
    ):
        (folder / name).write_text(text, encoding="utf-8")
