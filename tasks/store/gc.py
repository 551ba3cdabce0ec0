"""Collect what nothing needs: first into the trash by rename, and out of the trash once the grace is over.

Reads   <root>/.pins, <root>/.runs, manifests
Writes  <root>/.trash/<time in ns>/<kind>/<key>
Deletes <root>/.runs/<...>      records of runs that nothing can need any more

Kept is what a pin or one of a recipe's last runs names; what was found, built or begun within the grace, since the oldest
living lease began (tasks.store.lease), or since a run began that stopped on its way; and all that these list or were made
from. All of it is decided and moved behind the gate: no find is under way meanwhile. What is asked for again before the trash
is emptied is taken back out of it.
"""

import contextlib
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.errors import StoreError
from tasks.store.artifact import MANIFEST_NAME
from tasks.store.lease import clock_ns, collecting, oldest_lease, try_lock
from tasks.store.notes import Note, Notes
from tasks.store.origin import folder_bytes
from tasks.store.pins import last_refs, pins, run_notes, spent, unfinished_since
from tasks.store.reach import Reach
from tasks.store.records import read_record
from tasks.store.store import TRASH, ArtifactStore

log = logging.getLogger(__name__)

DELETING = ".deleting-"
KEY_CHARACTERS = 64
SPENT = "records of runs"


@dataclass(frozen=True)
class Taken:
    """What one run of the collector took, by what it is: artifacts one by one, shards by kind."""

    what: str
    number: int
    num_bytes: int


@dataclass(frozen=True)
class Collected:
    """What was done, or with ``dry_run`` what would be."""

    is_dry_run: bool
    grace_seconds: float
    taken: tuple[Taken, ...]
    num_kept: int
    num_in_use: int  # of those kept, the ones that only their last use keeps
    in_use_since: float | None  # when the oldest living lease began, in seconds since 1970
    unfinished_since: float | None  # when the earliest run began that stopped on its way
    deleted_bytes: int
    trash_bytes: int
    deleted: tuple[Taken, ...] = ()  # by what it is: records of runs, and of a bucket all that was deleted

    @property
    def taken_bytes(self) -> int:
        return sum(taken.num_bytes for taken in self.taken)

    def row(self) -> dict[str, Any]:
        lists = {"taken": [vars(one) for one in self.taken], "deleted": [vars(one) for one in self.deleted]}
        return {**vars(self), **lists, "taken_bytes": self.taken_bytes}


def collect(store: ArtifactStore, *, keep_last: int, grace_seconds: float, dry_run: bool = False) -> Collected:
    """Move what nothing needs into the trash, and delete what has been there for the grace.

    Raises StoreError where neither a pin nor a recorded run says what is needed: all of the store would go.
    """
    with collecting(store.root), _told(store.root):
        now_ns = clock_ns(store.root)
        marking = Marking(store, keep_last, now_ns / 1e9, grace_seconds)
        moved = marking.moved()
        batch = store.root / TRASH / str(now_ns)
        if not dry_run:
            moved = [(what, name) for what, name in moved if _move(store.root, name, batch)]
            _remove_locks(store.root, marking.cutoff)
        pruned = prune(store.notes, marking.spent, dry_run)
    where = store.root if dry_run else batch
    taken = summed((what, folder_bytes(where / name)) for what, name in moved)
    deleted_bytes = empty_trash(store.root, now_ns, grace_seconds, dry_run)
    return Collected(
        is_dry_run=dry_run,
        grace_seconds=grace_seconds,
        taken=taken,
        num_kept=marking.num_kept,
        num_in_use=marking.num_in_use,
        in_use_since=marking.lease,
        unfinished_since=marking.unfinished,
        deleted_bytes=deleted_bytes + sum(num_bytes for _, num_bytes in pruned),
        trash_bytes=folder_bytes(store.root / TRASH),
        deleted=summed(iter(pruned)),
    )


@dataclass
class Marking:
    """Which folders are needed. Made, and asked, behind the gate."""

    store: ArtifactStore
    keep_last: int
    now: float  # seconds since 1970
    grace_seconds: float  # what was used within it is kept
    lease: float | None = None
    unfinished: float | None = None
    num_in_use: int = 0
    spent: list[Note] = field(default_factory=list)  # records of runs that are needed no more

    def __post_init__(self) -> None:
        root = self.store.root
        self.reached = Reach(root)
        noted = run_notes(self.store.notes, is_strict=True)
        recorded = [note.value for note in noted]
        self.spent = spent(noted, self.now, self.keep_last)
        self.lease = oldest_lease(root)
        self.unfinished = unfinished_since(recorded, self.now)
        # A microsecond later: without any grace, what was made in this very tick of the clock is not in use either.
        begin = self.now - self.grace_seconds + 1e-6
        self.cutoff = min(when for when in (begin, self.lease, self.unfinished) if when is not None)
        roots = {str(pinned.get("ref")) for pinned in pins(self.store.notes, is_strict=True)}
        roots |= last_refs(recorded, self.keep_last)
        self.reached.follow(roots)
        self._refuse_unread()
        if not roots or (not len(self.reached) and any(map(self._unreached, self.store.kinds()))):
            raise nothing_needed(self.store)

    @property
    def num_kept(self) -> int:
        return len(self.reached)

    def _refuse_unread(self) -> None:
        """Raise StoreError for a needed artifact whose folder is there, and whose manifest cannot be read."""
        for folder in sorted(self.store.root / ref for ref in self.reached.unread if ref):
            if folder.exists() and read_record(folder / MANIFEST_NAME) is None:
                raise unread(str(folder))

    def moved(self) -> list[tuple[str, str]]:
        """What is not needed: for each folder what it is, and its path below the root.

        Artifacts are decided before the shards that they list.
        """
        # Each kind is listed once: what is committed meanwhile is in no list, and stays.
        listed = {kind: self._unreached(kind) for kind in self.store.kinds()}
        shards = {kind: keys for kind, keys in listed.items() if kind.endswith("-shard")}
        artifacts = [f"{kind}/{key}" for kind, keys in listed.items() if kind not in shards for key in keys]
        used = {ref for ref in artifacts if self._is_used(*ref.split("/"))}
        self.reached.follow(used)
        self._refuse_unread()
        moved = [(ref, ref) for ref in artifacts if not self.reached.has(*ref.split("/"))]
        self.num_in_use = len(artifacts) - len(moved)
        for kind, keys in shards.items():
            for key in keys:
                if self.reached.has(kind, key):
                    continue
                if self._is_used(kind, key):
                    self.reached.add(kind, key)
                    self.num_in_use += 1
                else:
                    moved.append((kind, f"{kind}/{key}"))
        return [*moved, *self._leftovers()]

    def _unreached(self, kind: str) -> list[str]:
        with os.scandir(self.store.root / kind) as entries:
            names = [entry.name for entry in entries]
        return [name for name in names if len(name) == KEY_CHARACTERS and not self.reached.has(kind, name)]

    def _is_used(self, kind: str, key: str) -> bool:
        """Whether it was committed, or found, since the cutoff."""
        root = self.store.root
        return _modified(f"{root}/{kind}/{key}") >= self.cutoff or _modified(f"{root}/.locks/{kind}-{key}") >= self.cutoff

    def _leftovers(self) -> Iterator[tuple[str, str]]:
        """Staging that nobody builds in, and what was set aside as damaged, both untouched since the cutoff."""
        root = self.store.root
        for path in sorted(root.glob(".staging/*/*")):
            if 0 < _newest(path) < self.cutoff and not _is_locked(root / ".locks" / f"{path.parent.name}-{path.name}"):
                yield f"staging of {path.parent.name}", str(path.relative_to(root))
        for path in sorted(root.glob(".damaged/*")):
            if 0 < _newest(path) < self.cutoff:
                yield "damaged", str(path.relative_to(root))


def empty_trash(root: Path, now_ns: int, grace_seconds: float, dry_run: bool) -> int:
    """Delete what has been in the trash for the grace; returns its bytes."""
    with collecting(root):  # nobody takes something back out of it meanwhile
        old = [
            path
            for path in (root / TRASH).glob("[0-9]*")
            if path.name.isdigit() and now_ns - int(path.name) >= grace_seconds * 1e9
        ]
        if dry_run:
            return sum(folder_bytes(path) for path in old)
        for path in old:
            path.rename(path.with_name(DELETING + path.name))
    num_bytes = 0
    for path in (root / TRASH).glob(f"{DELETING}*"):  # those too that a collector which was killed left
        num_bytes += folder_bytes(path)
        shutil.rmtree(path, ignore_errors=True)
    return num_bytes


def prune(notes: Notes, spent: Sequence[Note], dry_run: bool) -> list[tuple[str, int]]:
    """Remove records of runs that are needed no more; returns them as ``summed`` takes them."""
    return [(SPENT, note.num_bytes) for note in spent if dry_run or notes.remove_unchanged(note)]


def _move(root: Path, name: str, batch: Path) -> bool:
    """Rename into the trash, but for what somebody is building, perhaps anew since it was looked at."""
    *parents, kind, key = name.split("/")
    lock = root / ".locks" / f"{kind}-{key}"
    # Nobody begins to build an artifact meanwhile, for that a find has to come first; in its staging, perhaps.
    with try_lock(lock) if parents == [".staging"] or lock.exists() else contextlib.nullcontext(True) as is_free:
        if not is_free:
            return False
        (batch / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(root / name, batch / name)
        except FileNotFoundError:  # built to its end, or set aside, meanwhile
            return False
        return True


@contextmanager
def _told(root: Path) -> Iterator[None]:
    """Turns what the file system refuses the collector into a StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{error.filename or root}: {error.strerror or error}; mend that and run gc again: what it moved can be had back"
        ) from error


def _remove_locks(root: Path, cutoff: float) -> None:
    """Remove lock files that nobody holds, or has touched since the cutoff."""
    with contextlib.suppress(FileNotFoundError), os.scandir(root / ".locks") as entries:
        for entry in entries:
            if entry.stat().st_mtime < cutoff:
                with try_lock(Path(entry.path)) as is_free:
                    if is_free:
                        os.unlink(entry.path)


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with try_lock(path) as is_free:
        return not is_free


def nothing_needed(store: ArtifactStore) -> StoreError:
    """What a collector says that would take all."""
    return StoreError(
        f"{store.address}: no pin and no recorded run says what is needed, and all of it would be collected; "
        "run your recipes again (all of it will be found), or pin what you keep"
    )


def unread(where: str) -> StoreError:
    """What a collector says of a needed artifact whose manifest it cannot read."""
    return StoreError(
        f"{where}: its manifest cannot be read, and what it lists and was made from would be collected; "
        "run its recipe again, which rebuilds it, or mend it, or delete it with its pin"
    )


def summed(found: Iterator[tuple[str, int]]) -> tuple[Taken, ...]:
    numbers: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for what, num_bytes in found:
        numbers[what] += 1
        sizes[what] += num_bytes
    return tuple(Taken(what, numbers[what], sizes[what]) for what in numbers)


def _modified(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _newest(folder: Path) -> float:
    """When anything below a folder last changed; 0 where it is gone."""
    found = [_modified(os.fspath(folder))]
    for base, folders, names in os.walk(folder):
        found += [_modified(os.path.join(base, name)) for name in (*folders, *names)]
    return max(found)
