"""What the processes of all machines use of a bucket: a lease that each renews, for the bucket's collector to see.

Reads and writes  <url>/.leases/<number>   {"refs": [...], "began": seconds, "host", "process"}, removed when the process ends

No find waits for it: a thread writes the lease some seconds after the first use, which is soon enough, since what is condemned
lies for hours. A short command writes none.
"""

import atexit
import contextlib
import logging
import os
import platform
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import orjson

from tasks.errors import StoreError
from tasks.store.bucket import Bucket, Listed, Patience
from tasks.store.claim import boot_seconds
from tasks.store.layout import new_number

log = logging.getLogger(__name__)

LEASES, CLOCK = ".leases", "clock"
LEASE_SECONDS = 3600.0  # a lease that was not renewed for so long is a dead process's
RENEW_SECONDS = 900.0
FIRST_SECONDS, POLL_SECONDS = 10.0, 2.0
QUICK = Patience(connect_seconds=5, read_seconds=10, num_retries=1, retry_seconds=10, num_tries=1, first_seconds=0.5)


@dataclass
class _Lease:
    """One process's, of one bucket."""

    bucket: Bucket
    since: float
    name: str = field(default_factory=lambda: f"{LEASES}/{new_number()}")
    refs: set[str] = field(default_factory=set)
    began: float | None = None  # by the bucket's clock
    renewed: float | None = None
    num_told: int = 0

    def is_due(self, now: float) -> bool:
        if self.renewed is None:
            return now - self.since >= FIRST_SECONDS
        return now - self.renewed >= RENEW_SECONDS or (len(self.refs) > self.num_told and now - self.renewed >= FIRST_SECONDS)

    def renew(self) -> None:
        self.renewed = boot_seconds()  # even where it fails: then it is tried again when it is due again
        told = sorted(self.refs)
        value = {"refs": told, "host": platform.node(), "process": os.getpid()}
        self.bucket.put(self.name, orjson.dumps({**value, "began": self.began} if self.began else value))
        self.num_told = len(told)
        self.began = self.began or self.bucket.modified(self.name)


class _Keeper:
    """A process's leases, and the thread that renews them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.leases: dict[tuple[str, str | None], _Lease] = {}
        self.thread: threading.Thread | None = None

    def use(self, bucket: Bucket, ref: str) -> None:
        key = (bucket.url, bucket.endpoint)
        lease = self.leases.get(key)
        if lease and ref in lease.refs:
            return
        with self.lock:
            if key not in self.leases:
                self.leases[key] = _Lease(Bucket(bucket.url, bucket.endpoint, QUICK), boot_seconds())
            self.leases[key].refs.add(ref)
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="leases", daemon=True)
                self.thread.start()

    def renew(self) -> None:
        with self.lock:
            due = [lease for lease in self.leases.values() if lease.is_due(boot_seconds())]
        for lease in due:
            try:
                lease.renew()
            except StoreError as error:  # a bucket that may be read alone, or that is gone
                log.debug("%s; what this process uses is not told", error)
            except Exception as error:  # whatever it is: without this thread nothing would tell, for as long as the process lives
                log.warning(
                    "%s: %s: %s; what this process uses is not told for now", lease.bucket.url, type(error).__name__, error
                )

    def end(self) -> None:
        with self.lock:
            held, self.leases = list(self.leases.values()), {}
        for lease in held:
            if lease.renewed is not None:
                with contextlib.suppress(StoreError):
                    lease.bucket.delete(lease.name)

    def _run(self) -> None:
        wait = threading.Event()
        while not wait.wait(POLL_SECONDS):
            self.renew()


_keeper = _Keeper()


def use(bucket: Bucket, ref: str) -> None:
    """Tell, some seconds from now and as long as this process lives, that it uses an artifact."""
    _keeper.use(bucket, ref)


def end_uses() -> None:
    """Tell that this process uses nothing any more."""
    _keeper.end()


def _forget_parent() -> None:
    global _keeper  # noqa: PLW0603 - the parent's thread and its lock, perhaps held, are not the child's
    _keeper = _Keeper()


os.register_at_fork(after_in_child=_forget_parent)
atexit.register(end_uses)


@dataclass(frozen=True)
class Uses:
    """What living processes use: references, when the oldest of their leases began, and the leases of dead processes."""

    refs: frozenset[str]
    since: float | None
    dead: tuple[str, ...]


def bucket_clock(bucket: Bucket) -> float:
    """Now, in seconds since 1970, by the clock that dates the bucket's objects."""
    name = f"{LEASES}/{CLOCK}"
    bucket.put(name, b"")
    now = bucket.modified(name)
    if now is None:
        raise StoreError(
            f"{bucket.url}/{name}: was written and is not there; what it is now, by the bucket's clock, is not known"
        )
    return now


def uses(bucket: Bucket, leases: Iterable[Listed], now: float, lease_seconds: float = LEASE_SECONDS) -> Uses:
    """What these leases say. now: by the bucket's clock."""
    refs: set[str] = set()
    began: list[float] = []
    dead: list[str] = []
    for listed in leases:
        if listed.name.endswith(f"/{CLOCK}"):
            continue
        if now - listed.modified >= lease_seconds:
            dead.append(listed.name)
        elif data := bucket.get(listed.name):
            try:
                value = orjson.loads(data)
                refs.update(value["refs"])
                began.append(value.get("began") or listed.modified)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise StoreError(
                    f"{bucket.url}/{listed.name}: cannot be read ({type(error).__name__}), and what it names would be collected; "
                    f"delete it, or wait for {lease_seconds / 60:.0f} minutes"
                ) from error
    return Uses(frozenset(refs), min(began, default=None), tuple(dead))
