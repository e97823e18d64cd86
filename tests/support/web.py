"""A web server on this machine that answers as it is told, and remembers what it was asked for."""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """One answer of the server.

    Attributes:
        content: of the whole file.
        status: other than 200: no content is sent.
        tag: the file's ETag; empty: none.
        ranges: whether the server honours Range.
        announced: Content-Length; None: the true one.
        ends_after: bytes of the body after which the connection breaks; None: it does not.
        kind: Content-Type.
        location: where the answer redirects to; empty: it does not.
        stated: Content-Range; empty: the true one.
    """

    content: bytes = b""
    status: int = 200
    tag: str = '"1"'
    ranges: bool = True
    announced: int | None = None
    ends_after: int | None = None
    kind: str = "application/octet-stream"
    location: str = ""
    stated: str = ""


class Server(ThreadingHTTPServer):
    """Attributes: the answers to come, of which the last one stays, and the ranges asked for."""

    daemon_threads = True

    def __init__(self, answers: Sequence[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers)
        self.asked: list[str | None] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/w.npz"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.headers["Range"])
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer.location:
            self.send_response(302)
            self.send_header("Location", answer.location)
            self.end_headers()
            return
        if answer.status != 200:
            self.send_error(answer.status)
            return
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        body, start, size = answer.content, 0, len(answer.content)
        same = self.headers["If-Range"] in (None, answer.tag)
        if self.headers["Range"] and answer.ranges and same:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            body = body[start:]
        if start and not body:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", answer.stated or f"bytes {start}-{size - 1}/{size}")
        if answer.tag:
            self.send_header("ETag", answer.tag)
        announced = len(body) if answer.announced is None else answer.announced
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(body[: answer.ends_after])

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


@contextmanager
def serving(*answers: Answer) -> Iterator[Server]:
    """The server while the block runs."""
    server = Server(answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
