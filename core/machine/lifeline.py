"""Ends the processes of a run together: a process whose partner is gone would wait for it for ever.

Each process keeps a connection to the first one. The system closes the connections of a process
that is killed. A process that leaves in order says so before.
"""

import ctypes
import os
import selectors
import signal
import socket
import sys
import threading

from triptych.core.contracts import Ranks

GRACE = 15.0
"""Seconds in which the other processes leave after the first one has left.

One that takes longer waits for an exchange that never comes.
"""
MEETING = 60.0
"""Seconds in which all processes connect."""
GOODBYE, LOST = b".", b"!"
"""Words to the other processes: this one leaves in order; one is lost, and this one says so."""
STATUS = 1
"""Exit status of a process whose partner is gone."""
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


def follow_launcher() -> None:
    """This process gets SIGTERM when its launcher ends, whatever ends it. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGTERM))


class Lifeline:
    """Watches the other processes of a run, in a thread, until ``close``.

    Args:
        ranks: the processes. All of them make their lifelines at the same time.
        host: name or address of the machine of the first process.

    Raises:
        OSError: the first process cannot be reached.
    """

    def __init__(self, ranks: Ranks, host: str) -> None:
        self._ranks = ranks
        self._closed = threading.Event()
        self._links = dict(self._meet(host))
        threading.Thread(target=self._watch, daemon=True).start()

    def _meet(self, host: str) -> list[tuple[int, socket.socket]]:
        """Numbers of the processes at the other ends of this one's connections, with these."""
        server = None
        if self._ranks.is_main:
            server = socket.create_server(("", 0), backlog=self._ranks.world)
        port = self._ranks.largest(server.getsockname()[1] if server else 0)
        if server is None:
            link = socket.create_connection((host, port), timeout=MEETING)
            link.sendall(self._ranks.rank.to_bytes(8, "big"))
            return [(0, link)]
        with server:
            server.settimeout(MEETING)
            return [_accepted(server) for _ in range(1, self._ranks.world)]

    def close(self) -> None:
        """Leaves in order. The other processes have ``GRACE`` seconds to do so, too."""
        self._closed.set()
        for link in self._links.values():
            _send(link, GOODBYE)

    def _watch(self) -> None:
        """Waits for the first process that leaves."""
        with selectors.DefaultSelector() as selector:
            for rank, link in self._links.items():
                link.settimeout(None)
                selector.register(link, selectors.EVENT_READ, rank)
            (key, _), *_ = selector.select()
        word = _receive(self._links[key.data])
        self._pass_on(word or LOST)
        if word == GOODBYE:
            # The process may have failed alone. Its own message says why.
            self._closed.wait(GRACE)
        if not self._closed.is_set():
            if not word and self._ranks.rank <= 1:
                _say(key.data, self._ranks.world)
            os._exit(STATUS)

    def _pass_on(self, word: bytes) -> None:
        """Sends a word to all other processes, if this is the first one, which all of them know."""
        for link in self._links.values() if self._ranks.is_main else ():
            _send(link, word)


def _say(lost: int, world: int) -> None:
    remedy = "start the command again, a training with --resume auto"
    text = f"error: process {lost} of {world} has ended; {remedy}\n"
    os.write(2, text.encode())


def _accepted(server: socket.socket) -> tuple[int, socket.socket]:
    link, _ = server.accept()
    return int.from_bytes(link.recv(8, socket.MSG_WAITALL), "big"), link


def _send(link: socket.socket, word: bytes) -> None:
    try:
        link.send(word)
    except OSError:
        return  # the other end is gone


def _receive(link: socket.socket) -> bytes:
    """The next word, or none if the other end is gone."""
    try:
        return link.recv(1)
    except OSError:
        return b""
