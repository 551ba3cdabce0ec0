"""A claim: the one builder's place for a key among many machines, which ends when it is no longer renewed.

Reads and writes  <url>/.claims/<kind>-<key>/<term>   who builds, and a count that rises as long as the builder lives

Term 0 is created where none is there; the term after a dead builder's is created by exactly one of those who wait. Only
the creator of a term writes to it again, so a conditional put is all that is asked of the bucket. A builder is dead when
its count has stood still for as long as it promised to raise it, by the clock of who waits: no two clocks are compared.

A claim saves work and decides nothing: a builder that was taken for dead may still finish, and then the manifest, which
is put only where none is, tells which of the two made the artifact.
"""

import logging
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import orjson

from tasks.errors import StoreError
from tasks.store.bucket import Bucket

log = logging.getLogger(__name__)

CLAIMS = ".claims"
RENEWALS = 4  # within the promised time: three may fail
POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Holder:
    """What a term's object says. cache: the builder's cache folder, which one living process at a time builds a key in."""

    nonce: str
    cache: str
    host: str
    process: int
    seconds: float  # the count rises at least so often
    count: int = 0

    def spelled(self) -> bytes:
        return orjson.dumps(self)


@contextmanager
def claimed(bucket: Bucket, ref: str, cache: str, seconds: float) -> Iterator[None]:
    """Hold the claim to ``ref`` ("<kind>-<key>"); waits for another holder.

    Call it under the cache folder's own lock: a holder with the same cache is then an earlier process, and dead.
    """
    folder = f"{CLAIMS}/{ref}"
    own = Holder(uuid.uuid4().hex, cache, platform.node(), os.getpid(), seconds)
    term = _take(bucket, folder, own)
    renewal = _Renewal(bucket, folder, term, own)
    renewal.start()
    try:
        yield
    finally:
        renewal.end()
        if not renewal.is_lost:
            _release(bucket, folder, term, renewal.is_overdue)


def _take(bucket: Bucket, folder: str, own: Holder) -> int:
    """The term that is ours, once the builder before us has ended or is dead."""
    if _create(bucket, f"{folder}/0", own):  # as nearly always
        return 0
    seen: tuple[int, Holder] | None = None
    since, is_told = boot_seconds(), False
    while True:
        now = _newest(bucket, folder)
        if now is None or _is_dead(now, seen, since, own):
            term = now[0] + 1 if now else 0
            if _create(bucket, f"{folder}/{term}", own):
                return term
            continue
        if now != seen:
            seen, since = now, boot_seconds()
        if not is_told:
            log.info("%s: %s builds it; waiting", folder.removeprefix(f"{CLAIMS}/")[:24], now[1].host)
            is_told = True
        time.sleep(min(POLL_SECONDS, now[1].seconds / RENEWALS))


def _is_dead(now: tuple[int, Holder], seen: tuple[int, Holder] | None, since: float, own: Holder) -> bool:
    return now[1].cache == own.cache or (now == seen and boot_seconds() - since >= now[1].seconds)


def _newest(bucket: Bucket, folder: str) -> tuple[int, Holder] | None:
    """The last term and its holder, found without a listing: terms follow each other. None where the key is free."""
    term, newest = 0, None
    while data := bucket.get(f"{folder}/{term}"):
        newest = term, Holder(**orjson.loads(data))
        term += 1
    return newest


def _create(bucket: Bucket, name: str, own: Holder) -> bool:
    # "There is one" may be our own, by a try whose answer was cut off.
    return bucket.put_new(name, own.spelled()) or bucket.get(name) == own.spelled()


def _release(bucket: Bucket, folder: str, term: int, is_overdue: bool) -> None:
    try:
        if is_overdue and bucket.get(f"{folder}/{term + 1}"):
            return  # another's by now, who is found by the terms before it
        for number in range(term + 1):
            bucket.delete(f"{folder}/{number}")
    except StoreError as error:
        log.warning("%s; the claim ends by itself", error)


def boot_seconds() -> float:
    """Seconds that go on while the machine is suspended, unlike Python's monotonic ones on Linux."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


class _Renewal(threading.Thread):
    """Raises a claim's count for as long as the build runs."""

    def __init__(self, bucket: Bucket, folder: str, term: int, own: Holder) -> None:
        super().__init__(name="claim", daemon=True)
        self.bucket, self.folder, self.term, self.own = bucket, folder, term, own
        self.is_lost, self.renewed = False, boot_seconds()
        self._ended = threading.Event()

    @property
    def is_overdue(self) -> bool:
        """Whether another may have taken the builder for dead."""
        return boot_seconds() - self.renewed >= self.own.seconds

    def run(self) -> None:
        while not self._ended.wait(self.own.seconds / RENEWALS):
            try:
                # A process that slept past its time (a suspended laptop) must not write to a term that may be another's by now.
                if self.is_overdue or self.bucket.get(f"{self.folder}/{self.term + 1}"):
                    self.is_lost = True
                    log.warning("%s: the claim was lost to another builder; the first to finish is kept", self.folder)
                    return
                self.own = replace(self.own, count=self.own.count + 1)
                self.bucket.put(f"{self.folder}/{self.term}", self.own.spelled())
                self.renewed = boot_seconds()
            except Exception as error:  # whatever it is: without this thread the builder would be taken for dead
                log.warning("%s: %s: %s; the claim is not renewed for now", self.folder, type(error).__name__, error)

    def end(self) -> None:
        self._ended.set()
        self.join()
