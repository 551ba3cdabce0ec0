"""What keeps the collector off what is in use: a lease for as long as a process uses the store, a gate around every find.

Writes  <root>/.leases/<host>-<pid>-<number>   held with flock(2) by a process that finds or builds; dies with it
        <root>/.leases/gate                    shared by finds, alone for the collector's renames
        <root>/.leases/clock                   touched to learn what time it is where the store's files are dated

What was found or committed since the oldest living lease began is not collected, however short the grace.
"""

import contextlib
import fcntl
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.errors import StoreError

log = logging.getLogger(__name__)

LEASES = ".leases"
GATE, CLOCK = "gate", "clock"
# A process that uses more stores than this one after the other is a suite of tests: the oldest leases end.
MOST_LEASES = 64

_held: dict[tuple[str, int], int] = {}  # (root, process) to an open file
_held_lock = threading.Lock()


@contextmanager
def passing(root: Path) -> Iterator[None]:
    """While an artifact is looked at and taken: the collector waits. Takes the process's lease first.

    A store that is not there yet, or that cannot be written, has no collector to keep off.
    """
    try:
        handle = _open_gate(root)
    except OSError:
        yield
        return
    try:
        _lock_gate(root, handle, fcntl.LOCK_SH)
        _hold_lease(root)
        yield
    finally:
        os.close(handle)


@contextmanager
def collecting(root: Path) -> Iterator[None]:
    """While the collector moves things: no find is under way, and none begins. Raises StoreError where that cannot be had."""
    try:
        (root / LEASES).mkdir(parents=True, exist_ok=True)
        handle = _open_gate(root)
    except OSError as error:
        raise StoreError(f"{root}: cannot be collected ({error.strerror}); nothing was touched: mend its rights") from error
    try:
        _lock_gate(root, handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def clock_ns(root: Path) -> int:
    """Now, in ns since 1970, by the clock that dates the store's files: a file server's may be another than this machine's."""
    path = root / LEASES / CLOCK
    path.touch()
    return path.stat().st_mtime_ns


def oldest_lease(root: Path) -> float | None:
    """When the oldest living lease began, in seconds since 1970; None where nobody uses the store. Removes the dead ones.

    Call it while ``collecting``: a lease that is being taken is not yet held.
    """
    began = []
    for path in (root / LEASES).glob("*-*"):
        if _is_held(path):
            began.append(path.stat().st_mtime)
        else:
            path.unlink(missing_ok=True)
    return min(began, default=None)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold a builder's place where nobody does; yields whether."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def end_lease(root: Path) -> None:
    """Give up this process's own lease: it uses nothing of the store any more."""
    with _held_lock:
        if handle := _held.pop((os.fspath(root), os.getpid()), None):
            os.close(handle)


@contextmanager
def no_longer() -> Iterator[None]:
    """Leases that are taken within are given up at the end: who gave this process the work holds one as long as it runs."""
    before = set(_held)
    try:
        yield
    finally:
        for root, process in set(_held) - before:
            if process == os.getpid():
                end_lease(Path(root))


def _lock_gate(root: Path, handle: int, mode: int) -> None:
    try:
        fcntl.flock(handle, mode)
    except OSError as error:
        raise StoreError(
            f"{root}: its file system locks no files ({error.strerror}); "
            f"name it as file://{root}, which needs no locks there, or mount it with flock"
        ) from error


def _open_gate(root: Path) -> int:
    path = f"{root}/{LEASES}/{GATE}"
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        os.mkdir(f"{root}/{LEASES}")  # not its parents: to look into a store that is not there makes none
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _hold_lease(root: Path) -> None:
    key = (os.fspath(root), os.getpid())
    if key in _held:
        return
    with _held_lock:
        if key in _held:
            return
        path = root / LEASES / f"{platform.node()}-{os.getpid()}-{time.time_ns()}"
        with contextlib.suppress(OSError):  # a full disk: the collector has nothing that is older than its grace to fear for
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX)
            _held[key] = handle
        while len(_held) > MOST_LEASES:
            os.close(_held.pop(next(iter(_held))))


def _is_held(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
