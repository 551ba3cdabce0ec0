"""Fetch one file over http into a folder, a kill or a dropped connection at a time.

Writes  <folder>/partial         the bytes had so far
        <folder>/partial.json    what the server called them (ETag or Last-Modified) and how many there are in all
"""

import contextlib
import hashlib
import json
import logging
import shutil
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import httpx

from tasks.errors import DiskSpaceError, SourceError
from tasks.machine import Advance, Progress
from tasks.store.digest import READ_BYTES, write_all, write_atomically

log = logging.getLogger(__name__)

T = TypeVar("T")

NO_TOKENS: Mapping[str, str] = {}

# Seconds between tries that bring no new byte; a try that brings some starts the row again. Two minutes in all.
RETRY_WAITS_SECONDS: tuple[float, ...] = (1, 2, 4, 8, 15, 30, 60)

# Of these, the first few for a question about a file.
NUM_ASK_WAITS = 3

# A server that says nothing for a minute has forgotten us.
TIMEOUT = httpx.Timeout(60, connect=20)
ASK_TIMEOUT = httpx.Timeout(15, connect=5)  # of a plan

# What a later try may find mended; every other 4xx stays as it is.
PASSING_STATUS = (408, 425, 429)

HINTS = {
    401: "it asks for an account: put its token into SEQMILL_TOKENS, or fetch the file by hand and name its path",
    403: "access is refused: put a token into SEQMILL_TOKENS, or fetch the file by hand and name its path",
    404: "nothing is there: check the address, the path and the revision",
}


@dataclass(frozen=True)
class Remote:
    """What a server says of a file without sending it."""

    validator: str | None  # "etag:..." or "last-modified:..."
    num_bytes: int | None
    sha256: str | None  # of a file in a hub's large-file storage, which is named by it


@dataclass
class _Partial:
    """The bytes had so far and the digests of just these."""

    path: Path
    validator: str | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        self.sha256, self.md5, self.size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0

    @property
    def note(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def is_whole(self) -> bool:
        return self.total is not None and self.size == self.total

    def add(self, data: bytes) -> None:
        self.sha256.update(data)
        self.md5.update(data)
        self.size += len(data)

    def read_back(self) -> None:
        """Take up what an earlier run left; nothing, where its note is missing or does not fit the bytes."""
        try:
            note = json.loads(self.note.read_text())
            self.validator, self.total = note["validator"], note["total"]
            with self.path.open("rb", buffering=0) as source:
                while data := source.read(READ_BYTES):
                    self.add(data)
        except (OSError, ValueError, KeyError):
            self.start_over(None, None)
        if self.total is not None and self.size > self.total:
            self.start_over(None, None)

    def start_over(self, validator: str | None, total: int | None) -> None:
        self.path.unlink(missing_ok=True)
        self.__post_init__()
        self.validator, self.total = validator, total
        write_atomically(self.note, json.dumps({"validator": validator, "total": total}).encode())

    def fetched(self) -> "Fetched":
        return Fetched(self.path, self.size, self.sha256.hexdigest(), self.md5.hexdigest(), self.validator)


@dataclass(frozen=True)
class Fetched:
    """A file fetched whole, and its digests."""

    path: Path
    num_bytes: int
    sha256: str
    md5: str
    validator: str | None = None  # what the server called the bytes


class _DroppedError(Exception):
    """A try that ended early, for a reason that may pass."""

    def __init__(self, reason: str, wait_seconds: float = 0) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds  # what the server asks for


def ask(url: str, tokens: Mapping[str, str] = NO_TOKENS) -> Remote:
    """Ask a server for a file's validator and size. Raises SourceError where it cannot be had."""
    answers, host = _answers.get(), urlsplit(url).netloc
    if answers is None:
        return _ask(url, tokens, RETRY_WAITS_SECONDS[:NUM_ASK_WAITS])
    if host in answers.away:
        raise _unanswered(url, f"{host} did not answer a moment ago")
    if url not in answers.told:
        try:
            answers.told[url] = _ask(url, tokens, ())
        except SourceError as error:
            if isinstance(error.__cause__, _DroppedError):
                answers.away.add(host)
            raise
    return answers.told[url]


@dataclass
class _Answers:
    """What servers have said of files, and the hosts that said nothing."""

    told: dict[str, Remote] = field(default_factory=dict)
    away: set[str] = field(default_factory=set)


_answers: ContextVar[_Answers | None] = ContextVar("answers", default=None)


@contextlib.contextmanager
def asking_once() -> Iterator[None]:
    """Within, ``ask`` tries once for a file, and not at all at a host that did not answer: who plans is not to wait for it."""
    token = _answers.set(_Answers())
    try:
        yield
    finally:
        _answers.reset(token)


def _ask(url: str, tokens: Mapping[str, str], waits_seconds: tuple[float, ...]) -> Remote:
    headers = _authorization(url, tokens)
    try:
        return _retried(url, lambda: _ask_once(url, headers), lambda: 0, time.sleep, waits_seconds)
    except _DroppedError as dropped:
        raise _unanswered(
            url, f"{dropped}, {len(waits_seconds) + 1} tries in a row" if waits_seconds else str(dropped)
        ) from dropped


def _unanswered(url: str, what: str) -> SourceError:
    return SourceError(
        f"{url}: {what}; run again later, or state the file's sha256 in the recipe: then an archive in the store needs no server"
    )


def fetch(
    url: str,
    folder: Path,
    progress: Progress,
    sleep: Callable[[float], None] = time.sleep,
    tokens: Mapping[str, str] = NO_TOKENS,
) -> Fetched:
    """Bring the file at ``url`` into ``folder``, going on where an earlier run stopped.

    tokens: by host, what opens it. A server that the host sends on to is not given it.
    Raises SourceError when the server refuses, or when the tries run out; what was had by then stays for the next run.
    Raises DiskSpaceError before the first byte when the rest does not fit.
    """
    partial = _Partial(folder / "partial")
    partial.read_back()
    headers = _authorization(url, tokens)
    if partial.size and not partial.is_whole:
        log.info("%s: going on at byte %d of %s", url, partial.size, partial.total)
    if not partial.is_whole:
        try:
            _retried(url, lambda: _fetch_once(url, partial, progress, headers), lambda: partial.size, sleep, RETRY_WAITS_SECONDS)
        except _DroppedError as dropped:
            raise SourceError(
                f"{url}: {dropped}, {len(RETRY_WAITS_SECONDS) + 1} tries in a row; "
                f"{partial.size:,} bytes are kept: run again to go on from there"
            ) from dropped
    return partial.fetched()


def discard(folder: Path) -> None:
    """Forget what was fetched into ``folder``."""
    for name in ("partial", "partial.json"):
        (folder / name).unlink(missing_ok=True)


def check_room(folder: Path, num_bytes: int, what: str) -> None:
    """Raises DiskSpaceError where ``folder`` has less room than ``num_bytes``."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DiskSpaceError(
            f"{folder}: {free:,} bytes free, {num_bytes:,} still to come from {what}; make room or name another store"
        )


def _retried(
    url: str,
    attempt: Callable[[], T],
    num_bytes: Callable[[], int],
    sleep: Callable[[float], None],
    waits_seconds: tuple[float, ...],
) -> T:
    """Try until it succeeds. Raises the last _DroppedError when a row of tries has brought no new byte."""
    waits = iter(waits_seconds)
    while True:
        before = num_bytes()
        try:
            return attempt()
        except _DroppedError as dropped:
            if num_bytes() > before:
                waits = iter(waits_seconds)
            wait = next(waits, None)
            if wait is None:
                raise
            wait = max(wait, dropped.wait_seconds)
            log.warning("%s: %s at byte %d; again in %g s", url, dropped, num_bytes(), wait)
            sleep(wait)


def _ask_once(url: str, headers: dict[str, str]) -> Remote:
    with _answer("HEAD", url, headers) as answer:
        # A signed address of an object store answers to the one method that it was signed for.
        if answer.status_code not in (403, 405, 501):
            return _remote(url, answer)
    with _answer("GET", url, headers) as answer:
        return _remote(url, answer)


def _remote(url: str, answer: httpx.Response) -> Remote:
    _check_status(url, answer)
    linked = next((e for e in (_bare_etag(r.headers.get("x-linked-etag")) for r in answer.history) if e), None)
    is_sha256 = linked is not None and len(linked) == 64
    return Remote(_validator(answer), _int(answer.headers.get("content-length")), linked if is_sha256 else None)


def _fetch_once(url: str, partial: _Partial, progress: Progress, headers: dict[str, str]) -> None:
    headers = dict(headers)
    if partial.size:
        headers["Range"] = f"bytes={partial.size}-"
        if partial.validator and not partial.validator.startswith("etag:W/"):  # a weak one never matches
            headers["If-Range"] = partial.validator.partition(":")[2]
    with _answer("GET", url, headers) as answer:
        if answer.status_code == 416:
            _settle_unsatisfiable(answer, partial)
            return
        _check_status(url, answer)
        _settle_start(url, answer, partial)
        check_room(partial.path.parent, (partial.total or partial.size) - partial.size, url)
        with progress("archive", partial.total, "B") as advance:
            advance(partial.size)
            _take(answer, partial, advance)
    if partial.total is None:
        partial.total = partial.size
    if partial.size != partial.total:
        raise _DroppedError(f"{partial.size:,} of {partial.total:,} bytes came")


def _settle_unsatisfiable(answer: httpx.Response, partial: _Partial) -> None:
    """The range that was asked for is not there: the file is whole already, or it is another file now."""
    total = _int(answer.headers.get("content-range", "").partition("bytes */")[2])
    if total is not None and total == partial.size:
        partial.total = total
        return
    size = partial.size
    partial.start_over(None, None)
    raise _DroppedError(f"the file no longer has {size:,} bytes")


def _settle_start(url: str, answer: httpx.Response, partial: _Partial) -> None:
    """Make the partial file fit what the server is about to send: its continuation, or the whole."""
    validator = _validator(answer)
    if answer.status_code != 206:
        if partial.size:
            log.warning("%s: sent from the start (changed, or no ranges there); %d bytes put away", url, partial.size)
        partial.start_over(validator, _int(answer.headers.get("content-length")))
        return
    span, _, total = answer.headers.get("content-range", "").removeprefix("bytes ").partition("/")
    is_ours = _int(span.partition("-")[0]) == partial.size and partial.total in (None, _int(total))
    if not is_ours or (partial.validator and validator and validator != partial.validator):
        partial.start_over(None, None)
        raise _DroppedError("changed on the server, so it starts from the first byte")
    partial.total = _int(total)


def _take(answer: httpx.Response, partial: _Partial, advance: Advance) -> None:
    with partial.path.open("ab", buffering=0) as target, _dropped():
        for data in answer.iter_raw():
            write_all(target, data)
            partial.add(data)
            advance(len(data))


def _authorization(url: str, tokens: Mapping[str, str]) -> dict[str, str]:
    token = tokens.get(urlsplit(url).hostname or "")
    return {"Authorization": f"Bearer {token}"} if token else {}


@lru_cache(maxsize=1)
def _certificates() -> ssl.SSLContext:
    """Read once: httpx reads some 150 certificates for every client otherwise."""
    return httpx.create_ssl_context()


@contextlib.contextmanager
def _answer(method: str, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
    # identity: the bytes as published, not packed once more for the way.
    with (
        _dropped(),
        httpx.Client(
            follow_redirects=True, timeout=TIMEOUT if _answers.get() is None else ASK_TIMEOUT, verify=_certificates()
        ) as client,
        client.stream(method, url, headers={"Accept-Encoding": "identity", **headers}) as answer,
    ):
        yield answer


@contextlib.contextmanager
def _dropped() -> Iterator[None]:
    try:
        yield
    except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError) as error:
        raise _DroppedError(str(error) or type(error).__name__) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SourceError(f"{error or type(error).__name__}; check the address") from error


def _check_status(url: str, answer: httpx.Response) -> None:
    status = answer.status_code
    if status >= 500 or status in PASSING_STATUS:
        # Two minutes: a server that wants more is better asked by another run.
        raise _DroppedError(f"status {status}", min(_int(answer.headers.get("retry-after")) or 0, 120))
    if status >= 300:
        where = url if str(answer.url) == url else f"{url} (sent on to {answer.url.host})"
        raise SourceError(f"{where}: status {status}; {HINTS.get(status, 'check the address')}")


def _validator(answer: httpx.Response) -> str | None:
    for name in ("etag", "last-modified"):
        if value := answer.headers.get(name):
            return f"{name}:{value}"
    return None


def _bare_etag(value: str | None) -> str | None:
    return value.removeprefix("W/").strip('"') if value else None


def _int(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None
