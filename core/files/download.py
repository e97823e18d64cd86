"""Downloads one file over HTTP, and goes on where a broken download has ended.

The bytes go to a partial file. Beside it a small JSON file names the address and the server's mark
of the content (ETag or date). Only content of the same mark is continued (RFC 9110, If-Range).
"""

import json
import re
import shutil
import time
from collections.abc import Callable
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from triptych.core import __version__
from triptych.core.errors import UserError, printable

CHUNK = 1 << 20
"""Bytes read at a time."""
SCHEMES = ("https", "http")
TRIES = 5
"""Breaks in a row without a new byte after which a download is given up."""
PAUSE = 1.0
"""Seconds after the first break; they double with each further one."""
TIMEOUT = 30.0
"""Seconds that a server may be silent."""
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which another try may succeed (RFC 9110, RFC 6585)."""
PAGES = ("text/html", "application/xhtml+xml")
MARKUP = (b"<!doctype", b"<html", b"<?xml")
"""How pages begin, in small letters. No file of weights does."""

Advance = Callable[[int, int | None], None]
"""Gets the bytes that are here so far, and those of the whole file if they are known."""


class _Break(Exception):
    """The download ended early. The next try may go further."""


class _SameScheme(HTTPRedirectHandler):
    """Follows redirects that keep the scheme: no file of this machine, and no loss of TLS."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if urlsplit(newurl).scheme != urlsplit(req.full_url).scheme:
            _refuse(req.full_url, f"redirects to {newurl}, which has another scheme")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(address: str, path: Path, advance: Advance) -> None:
    """Downloads a file; a break of the connection is followed by further tries.

    Args:
        address: of ``SCHEMES``.
        path: of the partial file. If an earlier call has left one, the download goes on there.
        advance: called after each piece.

    Raises:
        UserError: the server is out of reach or refuses, answers a web page or something else than
            it announced, keeps breaking off, or the disk is full. What is here can be continued.
    """
    if urlsplit(address).scheme not in SCHEMES:
        _refuse(address, f"expected an address of {' or '.join(SCHEMES)}")
    most, breaks = 0, 0
    while True:
        try:
            return _receive(address, path, advance)
        except _Break as error:
            here = path.stat().st_size if path.exists() else 0
            breaks = 0 if here > most else breaks + 1
            most = max(most, here)
            if breaks >= TRIES:
                _refuse(address, f"{error}, and {TRIES} tries brought nothing more")
            time.sleep(PAUSE * 2**breaks)
        except OSError as error:
            raise UserError(f"{path}: cannot write: {error.strerror}") from error


def forget(path: Path) -> None:
    """Removes a partial file and its mark."""
    for each in (path, _mark_file(path)):
        each.unlink(missing_ok=True)


def _receive(address: str, path: Path, advance: Advance) -> None:
    """One try: asks for the rest of the file, and appends it."""
    here, begun = _begun(address, path)
    if here and here == begun.get("size"):
        return
    headers = {"User-Agent": f"triptych/{__version__}", "Accept-Encoding": "identity"}
    if here:
        headers |= {"Range": f"bytes={here}-", "If-Range": begun["mark"]}
    with _answer(Request(address, headers=headers), path) as response:
        start, total = _place(address, response, here, begun.get("size"))
        if start == 0:
            _begin(address, path, response.headers, total)
        _check_space(address, path, (total or 0) - start)
        with open(path, "ab" if start else "wb") as file:
            advance(start, total)
            while piece := _piece(response):
                if file.tell() == 0:
                    _check_kind(address, response.headers, piece)
                file.write(piece)
                advance(file.tell(), total)
            if total is not None and file.tell() < total:
                raise _Break(f"the server sent {file.tell():,} of {total:,} bytes")


def _answer(request: Request, path: Path) -> Any:
    """The server's response."""
    try:
        return build_opener(_SameScheme).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        with error:
            if error.code == 416:
                forget(path)
                raise _Break("the file ends before the announced number of bytes") from error
            if error.code in BUSY:
                raise _Break(f"answered {error.code} {error.reason}") from error
            _refuse(request.full_url, f"answered {error.code} {error.reason}")
    except URLError as error:
        _refuse(request.full_url, f"cannot be reached ({error.reason})")
    except (OSError, HTTPException) as error:
        raise _Break(f"the connection broke ({error!r})") from error


def _piece(response: Any) -> bytes:
    try:
        piece: bytes = response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise _Break(f"the connection broke ({error!r})") from error
    return piece


def _place(address: str, response: Any, here: int, announced: int | None) -> tuple[int, int | None]:
    """Where the response's first byte belongs, and the bytes of the whole file if it says so.

    Args:
        here: bytes of the partial file.
        announced: bytes of the whole file, as the first answer has stated them.
    """
    length = response.headers.get("Content-Length", "")
    size = int(length) if length.isdecimal() else None
    if response.status != 206:
        return 0, size
    stated = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", stated)
    start, last, total = map(int, found.groups()) if found else (-1, -1, -1)
    fits = start == here and start <= last < total == (announced or total)
    if not fits or size not in (None, last + 1 - start):
        _refuse(address, f"asked for the bytes from {here:,} on, it answered {stated!r}")
    return start, total


def _begun(address: str, path: Path) -> tuple[int, dict[str, Any]]:
    """Bytes of the partial file that may be continued, and what was noted of the file."""
    try:
        note = json.loads(_mark_file(path).read_text(encoding="utf-8"))
        here = path.stat().st_size
        known = note["address"] == address and isinstance(note["mark"], str)
    except (OSError, ValueError, KeyError, TypeError):
        return 0, {}
    return (here, note) if known else (0, {})


def _begin(address: str, path: Path, headers: HTTPMessage, size: int | None) -> None:
    """Notes the mark of the content that follows, if the server gives one that can be relied on."""
    forget(path)
    tag = headers.get("ETag", "")
    mark = headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
    if mark:
        text = json.dumps({"address": address, "mark": mark, "size": size})
        _mark_file(path).write_text(text, encoding="utf-8")


def _mark_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _check_space(address: str, path: Path, missing: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if missing > free:
        _refuse(address, f"{missing:,} bytes are missing, and {path.parent} has {free:,} bytes")


def _check_kind(address: str, headers: HTTPMessage, first: bytes) -> None:
    """Refuses a web page, such as the log-in of a network, in the place of the file."""
    kind = headers.get_content_type()
    if kind in PAGES or first[:64].lstrip().lower().startswith(MARKUP):
        _refuse(address, f"the server answered a page ({kind}), not the file")


def _refuse(address: str, problem: str) -> NoReturn:
    raise UserError(printable(f"{address}: {problem}"))
