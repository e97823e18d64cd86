"""Checkpoints that are not what was written: found, named, and passed over."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint_store import flip, newest, same, save

from triptych.core import checkpoint
from triptych.core.checkpoint import DamagedCheckpoint, Manifest
from triptych.core.checkpoint.manifest import FileEntry

# -------------------------------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit(path: Path, **changes: object) -> None:
    """Changes the manifest and makes its digest right again."""
    manifest = Manifest.from_json(path.read_bytes())
    path.write_text(manifest.model_copy(update=changes).to_json())


def edit_tensor(path: Path, **changes: object) -> None:
    tensors = dict(Manifest.from_json(path.read_bytes()).tensors)
    tensors["teacher.encoder.w"] = tensors["teacher.encoder.w"].model_copy(update=changes)
    edit(path, tensors=tensors)


def drop_tensor(path: Path) -> None:
    tensors = dict(Manifest.from_json(path.read_bytes()).tensors)
    del tensors["teacher.encoder.w"]
    edit(path, tensors=tensors)


def drop_file(path: Path) -> None:
    files = dict(Manifest.from_json(path.read_bytes()).files)
    del files["teacher.safetensors"]
    edit(path, files=files)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "one bit": ("teacher.safetensors", flip, "has changed since it was written"),
    "truncated": ("teacher.safetensors", truncate, r"\d+ bytes, \d+ were written"),
    "empty": ("teacher.safetensors", lambda p: p.write_bytes(b""), "0 bytes, "),
    "file gone": ("teacher.safetensors", Path.unlink, "No such file"),
    "manifest gone": ("manifest.json", Path.unlink, "No such file"),
    "manifest truncated": ("manifest.json", truncate, "not JSON"),
    "manifest empty": ("manifest.json", lambda p: p.write_bytes(b""), "not JSON"),
    "manifest binary": ("manifest.json", lambda p: p.write_bytes(b"\xff\0" * 99), "not JSON"),
    "manifest deep": ("manifest.json", lambda p: p.write_text("[" * 99999), "not JSON"),
    "manifest a list": ("manifest.json", lambda p: p.write_text("[]"), "not the manifest"),
    "manifest edited": (
        "manifest.json",
        lambda p: p.write_text(p.read_text().replace('"step": 300', '"step": 301')),
        "changed since it was written",
    ),
    "manifest of nonsense": (
        "manifest.json",
        lambda p: edit(p, step=-1),
        "step: Input should be greater than or equal to 0",
    ),
    "manifest pointing outside": (
        "manifest.json",
        lambda p: edit(p, files={"../x": FileEntry(sha256="0" * 64, size=1)}),
        "files.*should match pattern",
    ),
    "other shape": ("manifest.json", lambda p: edit_tensor(p, shape=[60]), "teacher.encoder.w"),
    "other dtype": ("manifest.json", lambda p: edit_tensor(p, dtype="int64"), "teacher.encoder.w"),
    "other file": ("manifest.json", lambda p: edit_tensor(p, file="queue.safetensors"), "teacher"),
    "unlisted tensor": ("manifest.json", drop_tensor, "teacher.encoder.w is not as the manifest"),
    "unlisted file": ("manifest.json", drop_file, "no file holds teacher.encoder.w"),
}  # fmt: skip
DEEP = ("other shape", "other dtype", "other file", "unlisted tensor", "unlisted file")
"""Forgeries with right hashes: found when the arrays are read, not by ``latest``."""


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_and_named(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 200)
    path = save(tmp_path, 300)
    name, damage, message = DAMAGES[kind]
    damage(path / name)
    with pytest.raises(DamagedCheckpoint, match=message) as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path} is damaged (") and name.split(".")[0] in str(
        caught.value
    )
    if kind in DEEP:
        return
    found, messages = newest(tmp_path)
    assert found == tmp_path / "checkpoints/step-00000200"
    assert messages == [f"{path} is damaged ({caught.value.reason}): using step 200"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_changed_byte_is_found_or_means_nothing(tmp_path: Path, data: st.DataObject) -> None:
    path = save(tmp_path, 1)
    before = checkpoint.read(path)
    file = path / data.draw(st.sampled_from(sorted(os.listdir(path))))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        manifest, state = checkpoint.read(path)
    except DamagedCheckpoint:
        return
    assert manifest == before[0] and same(state, before[1])
