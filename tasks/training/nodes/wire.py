"""What the node that leads and one that joins it say to each other: JSON objects, one a line, over TCP.

to a node that joins    challenge, welcome, refuse; run, go, keep, stop, leave
from one                hello, proof; ready, line, ended, going, kept, damaged
"""

import contextlib
import socket
import struct
import threading
from typing import Any

import orjson

Message = dict[str, Any]

# Of a plan with 100,000 shards, whose paths take about 120 bytes each, there is room for ten.
MOST_BYTES = 128 << 20
# A machine that lost its power says nothing: it counts as gone after some 20 s without an answer to the kernel's own questions.
# By name, for not every system has all of them.
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
SILENT_SECONDS = 20.0


class Wire:
    """One connection; several threads may send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        # A peer that stands still reads nothing, and its kernel goes on answering: what does not fit its buffers is given up.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SILENT_SECONDS), 0))
        connection.settimeout(None)
        self.own_address: str = connection.getsockname()[0]
        self.peer_address: str = connection.getpeername()[0]
        self._connection = connection
        self._reader = connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """To a peer that is gone, or takes nothing for SILENT_SECONDS, nothing is sent; ``receive`` then says so."""
        with self._sending:
            try:
                self._connection.sendall(orjson.dumps(message) + b"\n")
            except OSError:
                self.close()  # it may have half a message

    def receive(self, seconds: float | None = None, most_bytes: int = MOST_BYTES) -> Message | None:
        """The next message; None where the peer is gone, says what is no message, or nothing for so many ``seconds``."""
        try:
            self._connection.settimeout(seconds)
            line = self._reader.readline(most_bytes)
            message = orjson.loads(line) if line.endswith(b"\n") else None
            self._connection.settimeout(None)
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) and isinstance(message.get("say"), str) else None

    def close(self) -> None:
        """The peer sees the end at once, and a thread that receives here too."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def plain(said: object) -> str:
    """What a stranger says, as a part of one line of the log."""
    return " ".join(str(said).split())[:40]
