"""A damaged or forged file of weights at each entrance: one error line, and nothing is lost."""

import pickle

import numpy as np
import pytest

from tests.support import forged
from tests.support.forged import state, tensor
from triptych import backends
from triptych.core import reference
from triptych.core.api import get_model
from triptych.core.cli import exit_status, main

FLOATS = forged.VALUES.tobytes()
HONEST = forged.torch_zip(state(tensor()), {"0": FLOATS})
FILES = {
    "a cut legacy file": (
        forged.torch_legacy(state(tensor()), {"0": FLOATS})[:-5],
        "cut short inside its tensors",
    ),
    "an archive of two names": (
        HONEST.replace(b"archive/data/0", b"archive/../../", 1),
        "a zip archive with",
    ),
    "an absolute name": (HONEST.replace(b"archive/data/0", b"/archive/data/"), "outside of"),
    "a page": (b"<!DOCTYPE html><title>404</title>", "which is no known kind"),
    "a gadget": (
        state(forged.call("os", "system", forged.text("mkdir trap"))),
        "os.system: refused; nothing was run",
    ),
}
NAME = "weights.pth.tar"
DIGITS = ("-c", "moco_v3/digits", "--backend", "torch")
ENTRANCES = {
    "convert": ("convert", NAME, "kept.npz", "--force", "--to", "canonical"),
    "resume": ("train", *DIGITS, "--resume", NAME, "--output", "run"),
    "init": ("train", "-c", "moco_v3/digits_linear", "--backend", "torch", "--output", "run",
             "-o", f"init.weights={NAME}"),
    "eval": ("eval", "knn", *DIGITS, "--weights", NAME),
    "features": ("eval", "features", *DIGITS, "--weights", NAME, "--output", "kept.npz",
                 "--force"),
}  # fmt: skip


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder with an earlier file, and no framework."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "load", lambda _: reference)
    np.savez(tmp_path / "kept.npz", weight=forged.VALUES)
    return tmp_path


def check(folder, before, error, reason):
    """One line names file and reason; nothing was run, and the earlier file is as it was."""
    (line,) = error.splitlines()
    assert line.startswith("error: ") and NAME in line and reason in line
    assert any(word in line for word in forged.REMEDIES), line
    assert (folder / "kept.npz").read_bytes() == before
    assert not (folder / "trap").exists() and not list(folder.glob(".*"))


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_bad_file_is_one_line_at_each_command(kept, capsys, entrance):
    before = (kept / "kept.npz").read_bytes()
    for content, reason in FILES.values():
        (kept / NAME).write_bytes(content)
        assert main(ENTRANCES[entrance]) == 2
        check(kept, before, capsys.readouterr().err, reason)


def test_a_bad_file_is_one_line_in_python(kept, capsys):
    before = (kept / "kept.npz").read_bytes()
    for content, reason in FILES.values():
        (kept / NAME).write_bytes(content)
        assert exit_status(lambda: bool(get_model(weights=NAME, backend="torch"))) == 2
        check(kept, before, capsys.readouterr().err, reason)


@pytest.mark.parametrize("part", ["model.pdparams", "model.pdopt"])
def test_a_folder_of_fleetx_with_a_cut_part_is_refused_by_the_name_of_the_part(kept, capsys, part):
    (kept / NAME).mkdir()
    for name in ("model.pdparams", "model.pdopt"):
        content = pickle.dumps({"weight": forged.VALUES}, protocol=4)
        (kept / NAME / name).write_bytes(content[:-9] if name == part else content)
    before = (kept / "kept.npz").read_bytes()
    assert main(ENTRANCES["convert"]) == 2
    check(kept, before, capsys.readouterr().err, part)
