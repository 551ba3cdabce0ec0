"""A server on loopback that answers like the hosts that publish archives: redirects, ranges, validators, and faults."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Published:
    """One file and how the server behaves when asked for it."""

    data: bytes
    etag: str | None = "default"  # the MD5 of the data, as object stores give it
    last_modified: str | None = None
    takes_ranges: bool = True
    refuses_head: bool = False
    gives_length: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    # Taken one a GET, in order: ("drop", n) sends n bytes and closes; ("silence", n) sends n bytes and waits
    # for the client to give up; ("status", n) answers n; ("retry-after", text) 429.
    faults: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.etag == "default":
            self.etag = f'"{hashlib.md5(self.data).hexdigest()}"'


@dataclass
class Loopback:
    """The server's files, its redirects, and what it was asked."""

    port: int = 0
    files: dict[str, Published] = field(default_factory=dict)
    redirects: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)  # path -> address, extra headers
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    num_bytes_sent: int = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def asked(self, method: str) -> list[tuple[str, dict[str, str]]]:
        return [(path, headers) for asked, path, headers in self.requests if asked == method]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    loopback: Loopback

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, *arguments: Any) -> None:
        pass

    def _serve(self) -> None:
        self.loopback.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        if redirect := self.loopback.redirects.get(self.path):
            return self._answer(302, {"Location": redirect[0], **redirect[1]})
        published = self.loopback.files.get(self.path)
        if published is None:
            return self._answer(404, {})
        if self.command == "HEAD":
            return self._answer(403, {}) if published.refuses_head else self._whole(published, None)
        fault = published.faults.pop(0) if published.faults else ("none", 0)
        if fault[0] == "status":
            return self._answer(fault[1], {})
        if fault[0] == "retry-after":
            return self._answer(429, {"Retry-After": fault[1]})
        self._send(published, fault[1] if fault[0] in ("drop", "silence") else None)
        if fault[0] == "silence":
            self.connection.recv(1)  # nothing, once the client has closed
        return None

    def _send(self, published: Published, drop_at: int | None) -> None:
        start = self._start(published)
        if start is None:
            return self._whole(published, drop_at)
        size = len(published.data)
        if start >= size:
            return self._answer(416, {"Content-Range": f"bytes */{size}"})
        headers = self._headers(published, size - start) | {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
        return self._answer(206, headers, published.data[start:], drop_at)

    def _start(self, published: Published) -> int | None:
        asked = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        if not asked or not published.takes_ranges:
            return None
        if condition and condition not in (published.etag, published.last_modified):
            return None
        return int(asked.removeprefix("bytes=").partition("-")[0])

    def _whole(self, published: Published, drop_at: int | None) -> None:
        self._answer(200, self._headers(published, len(published.data)), published.data, drop_at)

    def _headers(self, published: Published, length: int) -> dict[str, str]:
        headers = {"Content-Length": str(length)} if published.gives_length else {"Connection": "close"}
        if published.etag:
            headers["ETag"] = published.etag
        if published.last_modified:
            headers["Last-Modified"] = published.last_modified
        return headers | published.headers

    def _answer(self, status: int, headers: dict[str, str], data: bytes = b"", drop_at: int | None = None) -> None:
        if not data:
            headers = {"Content-Length": "0", **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = data if drop_at is None else data[:drop_at]
        self.loopback.num_bytes_sent += len(sent)
        try:
            self.wfile.write(sent)
        except ConnectionError:  # the client was killed
            self.close_connection = True
        if drop_at is not None:
            self.close_connection = True


@contextmanager
def serving() -> Iterator[Loopback]:
    """A server on a free port, taken down at the end."""
    loopback = Loopback()
    handler = type("Handler", (_Handler,), {"loopback": loopback})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        loopback.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield loopback
        server.shutdown()
        thread.join()
