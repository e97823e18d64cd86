"""Published weights by name: the table, the cache, the check, and everything that takes a name."""

import hashlib
import io
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.support.web import Answer, Server, serving
from triptych import core
from triptych.core import cli, config, formats, published
from triptych.core.config import ALIASES
from triptych.core.errors import UserError
from triptych.core.files import caching, download
from triptych.core.parameters import initial_state
from triptych.core.published import listing, registry
from triptych.core.published.registry import Digest, Weights

FORMATS = {"moco", "moco_v3", "moca", "paddlefleetx", "plsc", "mmpretrain"}
SMALL = ("model.width=8", "model.depth=1", "model.heads=2", "method.hidden_dim=8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Where the cache puts the files."""
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    return tmp_path / "cache" / "weights"


def weights_file() -> bytes:
    """A whole model as npz, under canonical names."""
    buffer = io.BytesIO()
    np.savez(buffer, **initial_state(config.load("moco_v3/digits", [*SMALL, "seed=5"])))
    return buffer.getvalue()


CONTENT = weights_file()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(folder, monkeypatch) -> Server:
    """A server that publishes ``CONTENT`` as tiny_v1."""
    with serving(Answer(CONTENT)) as running:
        entry = Weights("moco_v3/digits", "canonical", running.address)
        monkeypatch.setattr(registry, "table", lambda: {"tiny_v1": entry})
        yield running


def publish(monkeypatch, server: Server, file: str, md5: str = "") -> Weights:
    """Makes tiny_v1 a file of another name."""
    entry = Weights(
        *("moco_v3/digits", "canonical", server.address.replace("w.npz", file)), md5=md5
    )
    monkeypatch.setattr(registry, "table", lambda: {"tiny_v1": entry})
    return entry


def test_the_table_holds_whole_entries_of_known_recipes_and_formats():
    table = registry.table()
    assert {"moca_vitb16_v1.0", "moco_v2_800ep", "mocov2_pt_imagenet2012_resnet50"} < set(table)
    recipes, files = config.recipes(), [entry.file for entry in table.values()]
    assert len(set(files)) == len(files)
    for name, entry in table.items():
        assert entry.recipe in recipes and entry.format in FORMATS, name
        assert re.fullmatch(r"https://[\w.-]+/[\w./-]+\.(pth|pth\.tar|pdparams|pd)", entry.address)
        assert "/" not in name and re.fullmatch("(?:[0-9a-f]{8})?", entry.md5)
        assert ALIASES.get(name, entry.recipe) == entry.recipe, name
        assert (entry.digest is not None) == (entry.format in ("moco", "mmpretrain")), name


def test_the_hash_in_a_name_is_that_of_torchvision_and_mmengine():
    digests = {
        "resnet50-0676ba61.pth": Digest("sha256", "0676ba61"),
        "mocov3_100e_in1k_20220927-f1144efa.pth": Digest("sha256", "f1144efa"),
        "vit-b-300ep.pth.tar": None,
        "moca_vitb16_200epochs_mom99_wd05_v0p9.pth": None,
    }
    for file, digest in digests.items():
        assert Weights("", "", f"https://there/{file}").digest == digest
    both = Weights("", "", "https://there/a-0676ba61.pth", md5="a04e12f8")
    assert both.digest == Digest("md5", "a04e12f8")


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"TRIPTYCH_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"TRIPTYCH_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/triptych"),
        ({"TRIPTYCH_CACHE": "", "XDG_CACHE_HOME": "b", "HOME": "/c"}, "/c/.cache/triptych"),
    ],
)
def test_the_cache_is_where_the_variables_say(monkeypatch, variables, place):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert caching.cache_folder() == Path(place)


def test_a_file_is_downloaded_once_and_is_whole_when_it_has_its_name(server, folder, capsys):
    path = published.local("tiny_v1")
    assert path == folder / "w.npz" and path.read_bytes() == CONTENT
    assert published.local(Path("tiny_v1")) == path and len(server.asked) == 1
    assert {p.name for p in folder.iterdir()} == {"w.npz", ".w.npz.lock"}
    printed = capsys.readouterr()
    assert printed.err == f"tiny_v1: downloading {server.address} to {path}\n" and not printed.out


def test_what_broke_off_has_another_name_and_is_continued(server, folder):
    server.answers[:] = [Answer(CONTENT, ends_after=700, ranges=False)]
    by_hand = re.escape(f"download {server.address} by other means and save it as {folder}/w.npz")
    with pytest.raises(UserError, match=f"tiny_v1: {server.address}: the server sent.*; {by_hand}"):
        published.local("tiny_v1")
    assert not (folder / "w.npz").exists()
    server.answers[:], server.asked[:] = [Answer(CONTENT)], []
    assert published.local("tiny_v1").read_bytes() == CONTENT
    assert server.asked == ["bytes=700-"]


@pytest.mark.parametrize(
    ("file", "md5"),
    [
        (f"tiny-{SHA256[:8]}.npz", ""),
        (f"tiny-{SHA256}.npz", ""),
        ("tiny.npz", hashlib.md5(CONTENT).hexdigest()[:8]),
    ],
)
def test_the_hash_is_checked_after_the_download_and_at_each_use(
    server, folder, monkeypatch, file, md5
):
    publish(monkeypatch, server, file, md5)
    other = bytearray(CONTENT)
    other[300] ^= 1
    server.answers[:] = [Answer(bytes(other))]
    kind = "md5" if md5 else "sha256"
    said = f"not the published file: its {kind} is [0-9a-f]+, that of the published one begins with"
    with pytest.raises(UserError, match=f"{said}.*; nothing was kept; download"):
        published.local("tiny_v1")
    assert [p.name for p in folder.iterdir()] == [f".{file}.lock"]
    server.answers[:] = [Answer(CONTENT)]
    path = published.local("tiny_v1")
    path.write_bytes(other)
    with pytest.raises(UserError, match=f"{path}: {said}.*; remove the file to download it anew"):
        published.local("tiny_v1")
    assert path.read_bytes() == other  # it may be the user's own


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n of a bird", CONTENT[:-30]])
def test_without_a_hash_the_file_must_hold_weights(server, folder, content):
    server.answers[:] = [Answer(content)]
    with pytest.raises(UserError, match="nothing was kept") as caught:
        published.local("tiny_v1")
    assert "\n" not in str(caught.value) and not (folder / "w.npz").exists()


def test_offline_a_file_that_was_put_there_by_hand_is_taken(server, folder):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=f"cannot be reached.*save it as {folder}/w.npz"):
        published.local("tiny_v1")
    (folder / "w.npz").write_bytes(CONTENT)
    assert published.local("tiny_v1") == folder / "w.npz"


def test_two_at_a_time_download_once(server):
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(published.local("tiny_v1"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4 and len(set(paths)) == 1 and len(server.asked) == 1


HOLDER = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_is_waited_for(tmp_path):
    path = tmp_path / "new" / "w.npz"
    with caching.alone(path, pytest.fail):
        pass
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "new" / ".w.npz.lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        waited = []
        with caching.alone(path, lambda: waited.append(process.stdin.close())):
            assert waited == [None] and process.wait() == 0


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write: .*; set TRIPTYCH_CACHE to a folder"):
        published.local("tiny_v1")


def test_a_path_is_left_as_it_is_and_wins_over_a_name(server, tmp_path, monkeypatch):
    for path in ("some/where", "absent.npz"):
        assert published.local(path) == Path(path)
    monkeypatch.chdir(tmp_path)
    Path("tiny_v1").mkdir()
    assert published.local("tiny_v1") == Path("tiny_v1") and not server.asked


def test_an_unknown_name_is_told_its_neighbour():
    said = r"moca_vitb16_v1.1: no such file.*\(did you mean 'moca_vitb16_v1.0'\?\); tools/info.py"
    with pytest.raises(UserError, match=said):
        published.local("moca_vitb16_v1.1")
    with pytest.raises(UserError, match="weights: no such file or folder, and no published"):
        published.local("weights")


def test_a_name_alone_gives_the_recipe_and_the_encoder(server, folder):
    small = [*SMALL, "precision=float64"]
    named = core.get_model(weights="tiny_v1", backend="numpy", overrides=small)
    other = core.get_model("moco_v3/digits", "numpy", folder / "w.npz", overrides=small)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16), np.uint8)
    np.testing.assert_array_equal(named.encode(images), other.encode(images))
    untrained = core.get_model("moco_v3/digits", "numpy", overrides=small)
    assert not np.allclose(named.encode(images), untrained.encode(images))
    for weights, said in (
        (None, "give a recipe"),
        ("tiny_v2", "did you mean 'tiny_v1'"),
        (folder / "w.npz", "the file does not say model.heads"),
    ):
        with pytest.raises(UserError, match=said):
            core.get_model(weights=weights)


def test_the_spec_takes_a_name_too(server):
    spec = config.load("moco_v3/digits", [*SMALL, "init.weights=tiny_v1"])
    lines: list[str] = []
    state = formats.initial_state(spec, lines.append)
    expected = np.load(io.BytesIO(CONTENT))["student.encoder.cls_token"]
    np.testing.assert_array_equal(state["student.encoder.cls_token"], expected)
    assert lines[0].startswith("init: tiny_v1 (canonical, student)")


def test_the_command_line_takes_a_name_and_lists_all(server, folder, tmp_path, capsys):
    trace = ["parity", "trace", "-c", "moco_v3/digits", "-o", f"{tmp_path}/a.npz", *SMALL]
    trace += ["--backend", "numpy", "--steps", "1", "--weights"]
    assert cli.main([*trace, "tiny_v2"]) == 2
    assert "error: tiny_v2: no such file" in capsys.readouterr().err
    assert cli.main([*trace, "tiny_v1"]) == 0
    name = "student.encoder.cls_token"
    first = np.load(tmp_path / "a.npz")[f"state/{name}/step0"]
    np.testing.assert_array_equal(first, np.load(io.BytesIO(CONTENT))[name])
    capsys.readouterr()
    assert cli.main(["info", "weights"]) == 0
    printed = capsys.readouterr().out
    assert printed == (
        f"tiny_v1  (moco_v3/digits, names of canonical, {folder}/w.npz)\n    {server.address}\n"
    )
    assert cli.main(["info", "weights", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == listing.report()
    assert listing.report()["tiny_v1"]["address"] == server.address


def test_the_bar_is_shown_on_a_terminal_only(server, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    published.local("tiny_v1")
    assert re.search(r"━━━.*/\d+\.\d kB", capsys.readouterr().err)
