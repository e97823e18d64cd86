"""Downloads from a server that breaks off, lies, redirects and answers something else."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.web import Answer, serving
from triptych.core.errors import UserError
from triptych.core.files import download as module
from triptych.core.files.download import download, forget

CONTENT = bytes(range(256)) * 40
GOOD = Answer(CONTENT)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr(module, "CHUNK", 1000)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "w.part"


def ignore(here: int, total: int | None) -> None:
    """The progress that nobody watches."""


def test_a_file_comes_whole_with_its_progress(part):
    seen = []
    with serving(GOOD) as server:
        download(server.address, part, lambda *progress: seen.append(progress))
    assert part.read_bytes() == CONTENT and server.asked == [None]
    size = len(CONTENT)
    assert seen == [(min(i * 1000, size), size) for i in range(12)]
    forget(part)
    assert not list(part.parent.iterdir())


def test_a_broken_download_goes_on_where_it_ended(part):
    broken = [replace(GOOD, ends_after=n) for n in (0, 1500, 2000)]
    with serving(*broken, GOOD) as server:
        download(server.address, part, ignore)
    assert part.read_bytes() == CONTENT
    assert server.asked == [None, None, "bytes=1500-", "bytes=3500-"]


def test_the_next_process_goes_on_too_and_a_finished_part_is_not_fetched_again(part):
    with serving(replace(GOOD, ends_after=3000, ranges=False)) as server:
        said = f"the server sent 3,000 of {len(CONTENT):,} bytes, and 5 tries brought nothing more"
        with pytest.raises(UserError, match=said):
            download(server.address, part, ignore)
        assert len(server.asked) == 1 + module.TRIES
        server.answers[:], server.asked[:] = [GOOD], []
        download(server.address, part, ignore)
        assert server.asked == ["bytes=3000-"] and part.read_bytes() == CONTENT
        download(server.address, part, ignore)
        assert len(server.asked) == 1
        part.write_bytes(CONTENT + b"more than there is")
        download(server.address, part, ignore)
    assert part.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "then",
    [
        Answer(CONTENT[::-1], tag='"2"'),  # the file has changed, so the server sends all of it
        Answer(CONTENT[::-1], ranges=False),
    ],
)
def test_content_of_two_files_is_never_joined(part, then):
    with serving(replace(GOOD, ends_after=3000), then) as server:
        download(server.address, part, ignore)
    assert part.read_bytes() == CONTENT[::-1] and server.asked == [None, "bytes=3000-"]


@pytest.mark.parametrize("tag", ["", 'W/"1"'])
def test_without_a_reliable_mark_the_download_begins_again(part, tag):
    begun = replace(GOOD, tag=tag, ends_after=3000)
    with serving(begun, replace(GOOD, tag=tag)) as server:
        download(server.address, part, ignore)
    assert part.read_bytes() == CONTENT and server.asked == [None, None]


def test_a_part_of_another_address_is_not_continued(part):
    with serving(replace(GOOD, ends_after=3000), Answer(status=404)) as server:
        with pytest.raises(UserError, match="404"):
            download(server.address, part, ignore)
        server.answers[:] = [GOOD]
        download(server.address.replace("w.npz", "v.npz"), part, ignore)
    assert part.read_bytes() == CONTENT and server.asked[-1] is None


@pytest.mark.parametrize(
    ("stated", "announced"),
    [
        ("bytes 0-10239/10240", None),
        ("bytes 3000-99/10240", None),
        ("", 99),
        ("bytes 3000-10239/10241", None),
    ],
)
def test_a_wrong_place_of_the_rest_is_refused(part, stated, announced):
    wrong = replace(GOOD, stated=stated, announced=announced)
    with serving(replace(GOOD, ends_after=3000), wrong) as server:
        with pytest.raises(UserError, match="asked for the bytes from 3,000 on, it answered"):
            download(server.address, part, ignore)
    assert part.read_bytes() == CONTENT[:3000]


@pytest.mark.parametrize(
    ("answer", "said", "tries"),
    [
        (replace(GOOD, announced=10_999), "ends before the announced number of bytes, and 5", 6),
        (replace(GOOD, announced=10**18), r"1,000,000,000,000,000,000 bytes are missing", 1),
        (replace(GOOD, kind="text/html"), r"answered a page \(text/html\), not the file", 1),
        (Answer(b"\n <!DOCTYPE html><p>Log in"), "answered a page", 1),
        (Answer(status=404), "answered 404 Not Found", 1),
        (Answer(status=500), "answered 500 Internal Server Error, and 5 tries", 5),
        (Answer(location="file:///etc/passwd"), "file:///etc/passwd", 1),
        (Answer(location="https://127.0.0.1/w"), "redirects to https://127.0.0.1/w, which has", 1),
        (Answer(location="ftp://127.0.0.1/w"), "redirects to ftp://127.0.0.1/w, which has", 1),
    ],
)
def test_what_is_not_the_file_is_refused_in_one_line(part, answer, said, tries):
    with serving(answer) as server:
        with pytest.raises(UserError, match=said) as caught:
            download(server.address, part, ignore)
        assert str(caught.value).startswith(f"{server.address}: ")
    assert "\n" not in str(caught.value) and len(server.asked) == tries


def test_a_redirect_is_followed_with_its_range(part):
    with serving(GOOD) as target:
        there = Answer(location=target.address)
        target.answers.insert(0, replace(GOOD, ends_after=3000))
        with serving(there) as server:
            download(server.address, part, ignore)
    assert part.read_bytes() == CONTENT and target.asked == [None, "bytes=3000-"]


def test_a_busy_server_is_asked_again(part):
    with serving(Answer(status=503), Answer(status=429), GOOD) as server:
        download(server.address, part, ignore)
    assert part.read_bytes() == CONTENT and len(server.asked) == 3


def test_other_schemes_and_an_absent_network_are_refused(part, monkeypatch):
    with pytest.raises(UserError, match=r"file:///etc/passwd: expected an address of https or"):
        download("file:///etc/passwd", part, ignore)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/w"
        with pytest.raises(UserError, match=r"cannot be reached.*refused"):
            download(address, part, ignore)
    monkeypatch.setattr(module, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/w"
        with pytest.raises(UserError, match=r"the connection broke.*timed out"):
            download(address, part, ignore)
    assert not part.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    part = tmp_path / "none" / "w.part"
    with serving(GOOD) as server, pytest.raises(UserError, match=f"{part.parent}|{part}"):
        download(server.address, part, ignore)
