"""A bucket: the few requests that a shared store makes of an object store, or of a folder that speaks like one.

Reads and writes  <url>/<name>   s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder

Nothing here is a rename and nothing trusts a listing. Every request may be made twice: what can pass (a 500, a cut
connection, a read that stalls) is tried again, by obstore within its own limits and then by ``_patiently``.
"""

import hashlib
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeVar
from urllib.parse import unquote, urlsplit

from tasks.errors import SettingsError, StoreError
from tasks.machine import Advance
from tasks.store.digest import Digest, digest_bytes

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

log = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "az", "file")

# One part of an upload, one range of a download: at 8 MB and more, requests cost under a hundredth of the time
# (benchmarks/remote_store.py). S3 takes 10,000 parts of one object at most.
PART_BYTES = 8 << 20
MOST_PARTS = 10_000
NUM_CONNECTIONS = 4  # of one file: on loopback 4 read faster than 8

MOST_DELETED, MOST_AT_ONCE = 1000, 16  # by one request, where it may be several; requests, where it may not

# How each provider's client is told of another server than the provider's own.
ENDPOINT_OPTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "s3": lambda endpoint: {"endpoint": endpoint, "virtual_hosted_style_request": False},
    "gs": lambda endpoint: {"base_url": endpoint},
    "az": lambda endpoint: {"endpoint": endpoint},
}

# A server that is away and an address or a credential that leads nowhere look the same from here.
AWAY = "run again to go on, once it answers; where it never has, check the address and the credentials"

T = TypeVar("T")


class Listed(NamedTuple):
    """An object as a listing has it."""

    name: str
    num_bytes: int
    modified: float  # seconds since 1970, by the bucket's clock


@dataclass(frozen=True)
class Patience:
    """How long a request is waited for, and how often it is tried again."""

    connect_seconds: float = 10.0
    read_seconds: float = 120.0  # without a byte of an answer; while a part is on its way up, too
    num_retries: int = 8  # within obstore, after a fifth of first_seconds, doubled each time, with jitter
    retry_seconds: float = 120.0
    num_tries: int = 4  # of all that
    first_seconds: float = 1.0  # between two of them, doubled each time


class Bucket:
    """One folder of an object store. Picklable: another process makes connections of its own.

    Raises SettingsError where the client is not installed.
    """

    def __init__(self, url: str, endpoint: str | None = None, patience: Patience | None = None) -> None:
        if not find_spec("obstore"):
            raise SettingsError(f"{url}: a shared store needs obstore; pip install 'seqmill[s3]'")
        self.url, self.endpoint, self.patience = url.rstrip("/"), endpoint, patience or Patience()

    @property
    def _store(self) -> "ObjectStore":
        return connect(self.url, self.endpoint, self.patience)

    def get(self, name: str) -> bytes | None:
        """An object's bytes; None where there is no such object."""
        import obstore

        return self._asked(name, lambda: bytes(obstore.get(self._store, name).bytes()))

    def num_bytes(self, name: str) -> int | None:
        """An object's size; None where there is no such object."""
        import obstore

        return self._asked(name, lambda: int(obstore.head(self._store, name)["size"]))

    def put(self, name: str, data: bytes) -> None:
        """Write an object, over the one that may be there."""
        import obstore

        self._patiently(name, lambda: obstore.put(self._store, name, data, use_multipart=False))

    def put_new(self, name: str, data: bytes) -> bool:
        """Write an object that is not there yet, all of it or nothing; False where one is, which may be by an earlier try."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        def put() -> bool:
            try:
                obstore.put(self._store, name, data, mode="create")
            except AlreadyExistsError:
                return False
            return True

        return self._patiently(name, put)

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""
        import obstore

        self._asked(name, lambda: obstore.delete(self._store, name))

    def names(self, folder: str = "") -> list[str]:
        """The names just below ``folder``, of those that the listing knows so far: to be shown, never to be relied on."""
        import obstore

        prefix = f"{folder}/" if folder else None
        found = self._asked(folder, lambda: obstore.list_with_delimiter(self._store, prefix))
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in found["common_prefixes"]] if found else []

    def objects(self, folder: str = "") -> Iterator[Listed]:
        """Every object below ``folder`` that the listing knows so far, a page at a time, those of one folder together."""
        import obstore

        prefix, last, stream = f"{folder}/" if folder else None, None, None

        def next_page() -> "Sequence[ObjectMeta] | None":
            nonlocal stream
            try:
                stream = stream or obstore.list(self._store, prefix, offset=last)
                return next(stream, None)
            except BaseException:
                stream = None  # the next try goes on behind the last page
                raise

        while page := self._asked(folder, next_page):
            yield from (Listed(one["path"], one["size"], one["last_modified"].timestamp()) for one in page)
            last = page[-1]["path"]

    def dated(self, name: str) -> tuple[bytes, float] | None:
        """An object's bytes, and when it was written by the bucket's clock, in seconds since 1970; None where it is not."""
        import obstore

        def get() -> tuple[bytes, float]:
            found = obstore.get(self._store, name)
            return bytes(found.bytes()), found.meta["last_modified"].timestamp()

        return self._asked(name, get)

    def modified(self, name: str) -> float | None:
        """When an object was written by the bucket's clock, in seconds since 1970; None where there is no such object."""
        import obstore

        found = self._asked(name, lambda: obstore.head(self._store, name))
        return found["last_modified"].timestamp() if found else None

    def delete_all(self, names: Sequence[str]) -> None:
        """Remove objects, a thousand a request where the store can; those that are not there are no matter."""
        import obstore

        def delete(some: Sequence[str]) -> bool:
            obstore.delete(self._store, some)
            return True

        for start in range(0, len(names), MOST_DELETED):
            some = list(names[start : start + MOST_DELETED])
            # None: one of them was not there, and of the others nothing is said.
            if self._asked(some[0], partial(delete, some)) is None:
                with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
                    list(pool.map(self.delete, some))

    def upload(self, source: Path, name: str, advance: Advance) -> None:
        """Write a file as an object, a large one in parts; the object appears whole or not at all.

        ``name`` is the file's alone: an object of its size there is this file, by a try whose answer was cut off.
        """
        import obstore

        size = source.stat().st_size
        if size <= PART_BYTES:
            self.put(name, source.read_bytes())
            advance(size)
            return
        part_bytes = max(PART_BYTES, -(-size // MOST_PARTS))
        told = _Told(advance)

        def put() -> None:
            if told.begin() and self.num_bytes(name) == size:
                return
            parts = _parts(source, part_bytes, told.advance)
            obstore.put(self._store, name, parts, chunk_size=part_bytes, max_concurrency=NUM_CONNECTIONS)

        self._patiently(name, put)

    def download(self, name: str, target: Path, num_bytes: int, advance: Advance) -> Digest | None:
        """Read an object into a file, by ranges; the digest of its bytes, None where there is none of so many bytes.

        Ranges that an earlier, killed download noted in ``<target>.ranges`` are not asked for again.
        """
        notes = target.with_name(f"{target.name}.ranges")
        had = _noted(notes) if target.exists() else set()
        if num_bytes == 0:
            target.write_bytes(b"")
            return digest_bytes(b"") if self.num_bytes(name) == 0 else None
        with target.open("ab"), target.open("r+b") as file, notes.open("a") as noted, ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            into = _Into(file.fileno(), noted)

            def read(start: int) -> bytes | memoryview | None:
                length = min(PART_BYTES, num_bytes - start)
                if start in had:
                    return os.pread(file.fileno(), length, start)
                data = self.read(name, start, length)
                if data is None or len(data) != length:
                    return None
                into.write(data, start)
                return data

            state = hashlib.sha256()
            # In order, beside the reading: a second pass over the file would cost as much as a fast line takes.
            for data in _ahead(pool, read, range(0, num_bytes, PART_BYTES)):
                if data is None:
                    return None
                state.update(data)
                advance(len(data))
            file.truncate(num_bytes)
        return Digest(state.hexdigest())

    def read(self, name: str, start: int, length: int) -> memoryview | None:
        """A range of an object; None where there is no such object, or where it ends before ``start``."""
        import obstore

        try:
            found = self._asked(name, lambda: memoryview(obstore.get_range(self._store, name, start=start, length=length)))
        except StoreError:
            size = self.num_bytes(name)
            if size is not None and size < start + length:
                return None
            raise
        return found

    def _asked(self, name: str, call: Callable[[], T]) -> T | None:
        """What ``call`` returns; None where there is no such object."""
        from obstore.exceptions import NotFoundError

        def ask() -> T | None:
            try:
                return call()
            except (NotFoundError, FileNotFoundError):
                return None

        return self._patiently(name, ask)

    def _patiently(self, name: str, call: Callable[[], T]) -> T:
        """What ``call`` returns, tried again where that may help. Raises StoreError."""
        from obstore import exceptions as ex

        final = (
            ex.PermissionDeniedError, ex.UnauthenticatedError, ex.InvalidPathError, ex.NotSupportedError,
            ex.UnknownConfigurationKeyError, ex.NotFoundError, FileNotFoundError,
        )  # fmt: skip
        for number in range(1, self.patience.num_tries + 1):
            try:
                return call()
            except (ex.BaseError, OSError) as error:
                what = _in_one_line(error)
                if isinstance(error, final) or number == self.patience.num_tries:
                    hint = "check its name, the credentials and their rights" if isinstance(error, final) else AWAY
                    raise StoreError(f"{self.url}/{name}: {what}; {hint}") from None
                log.warning("%s/%s: %s; tried again", self.url, name, what)
                time.sleep(self.patience.first_seconds * 2.0 ** (number - 1))
        raise AssertionError("num_tries is at least 1")


@lru_cache(maxsize=8)
def connect(url: str, endpoint: str | None, patience: Patience) -> "ObjectStore":
    """A connection pool, kept for as long as the process lives. Credentials come from the environment alone."""
    from obstore.store import LocalStore, from_url

    parts = urlsplit(url)
    if parts.scheme == "file":
        return LocalStore(prefix=unquote(parts.path), mkdir=True)
    options: dict[str, Any] = ENDPOINT_OPTIONS[parts.scheme](endpoint) if endpoint else {}
    store: ObjectStore = from_url(
        url,
        **options,
        client_options={
            "allow_http": (endpoint or "").startswith("http://"),
            "connect_timeout": timedelta(seconds=patience.connect_seconds),
            "read_timeout": timedelta(seconds=patience.read_seconds),
            "timeout": timedelta(hours=1),  # of a whole request: a slow line is no fault, a silent one is
        },
        retry_config={
            "max_retries": patience.num_retries,
            "retry_timeout": timedelta(seconds=patience.retry_seconds),
            "backoff": {
                "init_backoff": timedelta(seconds=patience.first_seconds / 5),
                "max_backoff": timedelta(seconds=10),
                "base": 2,
            },
        },
    )
    return store


def is_url(store: str) -> bool:
    """Whether a store's address is that of a shared one."""
    return store.partition("://")[0] in SCHEMES and "://" in store


def _in_one_line(error: Exception) -> str:
    """What an error says, without the server's XML, which may hold the name of a credential, and without the long address."""
    text = re.sub(r"https?://\S+ ?", "", str(error).split("Debug source")[0].split("<")[0])
    return " ".join(text.split())[:300].rstrip(" :,") or type(error).__name__


class _Told:
    """Tells a bar how far an upload is; what a failed try told is taken back by the next."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._sent, self._is_begun = advance, 0, False

    def begin(self) -> bool:
        """Whether there was a try before."""
        is_again, self._is_begun = self._is_begun, True
        self._advance(-self._sent)
        self._sent = 0
        return is_again

    def advance(self, amount: int) -> None:
        self._sent += amount
        self._advance(amount)


def _parts(source: Path, part_bytes: int, advance: Advance) -> Iterator[bytes]:
    with source.open("rb", buffering=0) as file:
        while data := file.read(part_bytes):
            yield data
            advance(len(data))


def _noted(notes: Path) -> set[int]:
    try:
        return {int(line) for line in notes.read_text().splitlines() if line.isdigit()}
    except OSError:
        return set()


class _Into:
    """Writes ranges into a file, and notes each once it is there."""

    def __init__(self, handle: int, noted: TextIO) -> None:
        self.handle, self.noted, self.lock = handle, noted, threading.Lock()

    def write(self, data: memoryview, start: int) -> None:
        place = start
        while data:
            written = os.pwrite(self.handle, data, place)
            data, place = data[written:], place + written
        with self.lock:
            self.noted.write(f"{start}\n")
            self.noted.flush()


def _ahead(pool: ThreadPoolExecutor, call: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
    """What ``call`` returns for every item, in order; so many are under way that memory stays small."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(call, item))
        if len(waiting) > 2 * NUM_CONNECTIONS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
