"""Give room back in the cache of a shared store: what was used longest ago goes, never what a living process has used.

Reads and writes <cache>/<kind>/<key>           copies of what the bucket has
                 <cache>/.locks/<kind>-<key>    whose time is that of their use
                 <cache>/.trimmed               what is being deleted

A file is in use from before it is fetched until the process that asked for it ends (tasks.store.lease). What is taken away is
fetched again when it is asked for.
"""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tasks.store.lease import clock_ns, collecting, oldest_lease, try_lock

log = logging.getLogger(__name__)

TRIMMED = ".trimmed"
SPARE_SHARE = 20  # of the bound, kept free by a trim


@dataclass(frozen=True)
class Trimmed:
    """What went, and the bytes of what stays."""

    number: int
    num_bytes: int
    kept_bytes: int


class Room:
    """Keeps one cache within its bound; ``most_bytes`` None: it has none. Picklable."""

    def __init__(self, root: Path, most_bytes: int | None) -> None:
        self.root, self.most_bytes, self.free_bytes = root, most_bytes, 0

    def make(self, num_bytes: int) -> None:
        """See that so many bytes fit, by a trim of a part of the bound more, so that few fetches have to look at all of it."""
        if self.most_bytes is None:
            return
        if num_bytes > self.free_bytes:
            spare = self.most_bytes // SPARE_SHARE
            trimmed = trim(self.root, max(self.most_bytes - spare - num_bytes, 0))
            if trimmed.kept_bytes + num_bytes > self.most_bytes:
                log.warning("%s: %d bytes are in use, more than its bound leaves; it grows", self.root, trimmed.kept_bytes)
            self.free_bytes = spare + num_bytes
        self.free_bytes -= num_bytes


class _Copy(NamedTuple):
    used: float  # seconds since 1970
    num_bytes: int
    path: str


def trim(root: Path, most_bytes: int, *, unused_seconds: float = 0.0, dry_run: bool = False) -> Trimmed:
    """Delete copies, those used longest ago first, until no more than ``most_bytes`` are left.

    unused_seconds: only what was not used for so long.
    """
    with collecting(root):
        now_ns, lease = clock_ns(root), oldest_lease(root)
        before = min(now_ns / 1e9 - unused_seconds + 1e-6, math.inf if lease is None else lease)
        copies = sorted(_copies(root))
        left, gone = sum(copy.num_bytes for copy in copies), []
        for copy in copies:
            if left <= most_bytes or copy.used >= before:
                break
            if dry_run or _move(root, copy, root / TRIMMED / str(now_ns)):
                left -= copy.num_bytes
                gone.append(copy)
    shutil.rmtree(root / TRIMMED, ignore_errors=True)  # what a trim that was killed left, too
    return Trimmed(len(gone), sum(copy.num_bytes for copy in gone), left)


def _copies(root: Path) -> Iterator[_Copy]:
    for kind in _entries(root):
        if not kind.name.startswith("."):
            for folder in _entries(kind.path):
                used = max(_modified(folder.path), _modified(f"{root}/.locks/{kind.name}-{key_of(folder.name)}"))
                yield _Copy(used, _bytes_below(folder.path), folder.path)


def key_of(name: str) -> str:
    """The key whose copy a folder is: another build's has its content behind it (tasks.store.cache)."""
    return name.partition(".")[0]


def _entries(folder: Path | str) -> list["os.DirEntry[str]"]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    return []


def _bytes_below(folder: str) -> int:
    return sum(os.lstat(os.path.join(base, name)).st_size for base, _, names in os.walk(folder) for name in names)


def _modified(path: str) -> float:
    with contextlib.suppress(OSError):
        return os.stat(path).st_mtime
    return 0.0


def _move(root: Path, copy: _Copy, target: Path) -> bool:
    """Out of its place, but for what is being built, or uploaded again."""
    path = Path(copy.path)
    lock = root / ".locks" / f"{path.parent.name}-{key_of(path.name)}"
    with try_lock(lock) if lock.exists() else contextlib.nullcontext(True) as is_free:
        if not is_free:
            return False
        target.mkdir(parents=True, exist_ok=True)
        path.rename(target / f"{path.parent.name}-{path.name}")
        if path.name == key_of(path.name):
            lock.unlink(missing_ok=True)
        return True
