"""The artifact store: find, build under a lock, commit by rename, set aside what is damaged.

``<root>/<kind>/<key>/{files, manifest.json}`` is finished; ``<root>/.staging/<kind>/<key>/`` is being built and survives a
crash; ``<root>/.locks`` holds flock files, which die with their holder; ``<root>/.damaged`` keeps what was set aside;
``<root>/.trash`` what `seqmill gc` took, until its grace is over.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks.errors import RefError, StoreError
from tasks.machine import Advance
from tasks.store.artifact import MANIFEST_NAME, Artifact, FileEntry, Manifest, ShardEntry, content_of
from tasks.store.digest import Digest, DigestMemory, digest_file, digest_json, fsync_path, fsync_tree
from tasks.store.lease import passing
from tasks.store.notes import FolderNotes, Notes
from tasks.store.whole import damaged_shard

log = logging.getLogger(__name__)

KIND = re.compile(r"[a-z][a-z-]*")
SCRATCH_NAME = ".scratch"  # inside staging: what a build needs while it runs; removed by the commit
TRASH = ".trash"
MOST_LOADED = 100  # manifests read to tell which of many references is meant


class ArtifactStore:
    """All artifacts below one root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.digests = DigestMemory(self.root / ".digests")

    @property
    def notes(self) -> Notes:
        """Where pins and runs are recorded."""
        return FolderNotes(self.root)

    @property
    def address(self) -> str:
        """How a person names the store."""
        return str(self.root)

    def place(self, kind: str, key: Digest) -> str:
        """What a person deletes to be rid of an artifact."""
        return str(self.root / kind / key)

    def find(self, kind: str, key: Digest) -> Artifact | None:
        """The artifact, if it is there whole by its sizes; None where it is absent or damaged."""
        with passing(self.root):
            artifact = self.load(kind, key)
            if artifact is None or self.damage(artifact):
                return None
            self.keep(artifact)
            return artifact

    def find_all(self, kind: str, keys: Sequence[Digest]) -> list[Artifact | None]:
        """What ``find`` says of every key; a shared store asks for many at once."""
        return [self.find(kind, key) for key in keys]

    def load_all(self, refs: Sequence[tuple[str, Digest]], *, is_anew: bool = False) -> list[Artifact | None]:
        """What ``load`` says of every (kind, key); a shared store asks for many at once; is_anew: of all, whatever it knows."""
        return [self.load(kind, key) for kind, key in refs]

    def listed(self, entries: Sequence[ShardEntry]) -> list[Artifact | None]:
        """The shards of a list, each as it is listed; None where the store has none of that content."""
        refs = [(entry.kind, entry.key) for entry in entries]
        found = self.load_all(refs)
        # Built anew elsewhere, perhaps, since this machine heard of it.
        others = [i for i, shard in enumerate(found) if shard and shard.content != entries[i].content]
        for i, shard in zip(others, self.load_all([refs[i] for i in others], is_anew=True), strict=True):
            found[i] = shard if shard and shard.content == entries[i].content else None
        return found

    def learn(self) -> None:
        """Bring below ``root`` the manifests of all that is no shard; here they are."""

    def keep(self, artifact: Artifact) -> None:
        """Note that the artifact is in use: the time of its lock file, from which `seqmill gc` counts, becomes now."""
        with contextlib.suppress(OSError):  # a store that cannot be written is not collected either
            path = self.lock_path(artifact.kind, artifact.key)
            try:
                os.utime(path)
            except FileNotFoundError:  # the store was copied without it, or the collector removed it
                path.parent.mkdir(exist_ok=True)
                path.touch()

    def lock_path(self, kind: str, key: Digest) -> Path:
        """The file that the builder of a key locks; its time says when the artifact was last found."""
        return self.root / ".locks" / f"{kind}-{key}"

    def load(self, kind: str, key: Digest) -> Artifact | None:
        """The artifact as its manifest tells it, unchecked; None where there is no readable manifest."""
        path = self.root / kind / key / MANIFEST_NAME
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValidationError, OSError) as error:
            log.warning("%s: unreadable manifest (%s); the artifact counts as absent", path, type(error).__name__)
            return None
        if (manifest.kind, manifest.key) != (kind, key):
            log.warning("%s: the manifest of %s/%s; the artifact counts as absent", path, manifest.kind, manifest.key[:12])
            return None
        return Artifact(self.root, manifest, found=True)

    def damage(self, artifact: Artifact, digests: bool = False) -> str | None:
        """What is wrong with an artifact, in one line: a missing file, another size, or (asked for) another digest."""
        if artifact.key != digest_json(artifact.manifest.identity):
            return "the manifest's key is not the digest of its identity"
        for entry in artifact.manifest.files:
            if problem := self.file_problem(artifact, entry) if digests else size_problem(artifact.folder / entry.name, entry):
                return problem
        return self._damaged_shard(artifact, digests)

    def file_problem(self, artifact: Artifact, entry: FileEntry, advance: Advance = lambda amount: None) -> str | None:
        """Where a file, read through, is not the one in the manifest; ``advance`` is told the bytes."""
        path = artifact.folder / entry.name
        if problem := size_problem(path, entry):
            advance(entry.num_bytes)
            return problem
        if (digest := digest_file(path, advance)) != entry.digest:
            return f"{entry.name} has the digest {digest[:12]}, its manifest says {entry.digest[:12]}"
        return None

    def _damaged_shard(self, artifact: Artifact, digests: bool) -> str | None:
        if not digests:
            return damaged_shard(self.root, artifact.manifest.shards)
        for entry in artifact.manifest.shards:
            shard = self.load(entry.kind, entry.key)
            if shard is None or shard.content != entry.content:
                return f"shard {entry.name} ({entry.kind}/{entry.key[:12]}) is {'another' if shard else 'missing'}"
            if problem := self.damage(shard, digests):
                return f"shard {entry.name} ({entry.kind}/{entry.key[:12]}): {problem}"
        return None

    @contextmanager
    def lock(self, kind: str, key: Digest) -> Iterator[None]:
        """Hold the one builder's place for a key; waits for another holder, and dies with this process."""
        path = self.lock_path(kind, key)
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = path.open("a+")
            except OSError as error:
                raise StoreError(
                    f"{path.parent}: cannot be written ({error.strerror}); mend that, or name another store with --store"
                ) from error
            with handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    log.info("%s/%s: another process builds it; waiting", kind, key[:12])
                    fcntl.flock(handle, fcntl.LOCK_EX)
                if not is_at(path, handle.fileno()):
                    continue  # `seqmill gc` removed the file between the opening and the lock
                yield
                return

    def staging(self, kind: str, key: Digest) -> Path:
        """The folder in which an artifact is built, made if absent, as an earlier try left it."""
        path = self.root / ".staging" / kind / key
        if not path.exists():
            self._out_of_trash(path)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def restore(self, kind: str, key: Digest) -> Artifact | None:
        """The artifact out of the trash, with its shards, in its place again; None where it is not. Call it under the lock."""
        with passing(self.root):
            if not self._out_of_trash(self.root / kind / key):
                return None
            artifact = self.load(kind, key)
            for entry in artifact.manifest.shards if artifact else ():
                if not (self.root / entry.kind / entry.key).exists():
                    self._out_of_trash(self.root / entry.kind / entry.key)
            restored = self.find(kind, key)
        if restored is None:
            self.set_aside(kind, key, "damaged in the trash")
        return restored

    def _out_of_trash(self, path: Path) -> bool:
        if not (self.root / TRASH).exists():
            return False
        with passing(self.root):  # or its deletion could begin meanwhile
            for found in sorted(self.root.glob(f"{TRASH}/[0-9]*/{path.relative_to(self.root)}"), reverse=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                found.rename(path)
                log.info("%s: taken back out of the trash", path)
                return True
        return False

    def rescue(self, kind: str, key: Digest) -> Artifact | None:
        """A listed shard that is not in its place, out of a collector's trash; a local store has nothing there that is listed."""
        return None

    def lose_shard(self, kind: str, key: Digest) -> None:
        """Hear of a listed shard that is not there: a local store sees it by itself at the next find of what lists it."""

    def set_aside(self, kind: str, key: Digest, problem: str) -> None:
        """Move a damaged artifact out of the way, whole, for a person to look at. Call it under the lock."""
        source = self.root / kind / key
        target = self.root / ".damaged" / f"{kind}-{key}-{time.time_ns()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # collected meanwhile
            source.rename(target)
        log.warning("%s/%s: damaged (%s); set aside in %s", kind, key[:12], problem, target)

    def commit(
        self,
        identity: dict[str, Any],
        shards: tuple[ShardEntry, ...],
        stats: dict[str, Any],
        produced_by: dict[str, Any],
        known: dict[str, Digest],
    ) -> Artifact:
        """Make what is in staging an artifact: digest, fsync, manifest, rename. Call it under the lock.

        ``known``: digests of files that the build has already read through, by name.
        """
        kind, key = identity["kind"], digest_json(identity)
        staging = self.staging(kind, key)
        with contextlib.suppress(FileNotFoundError):  # what cannot be removed must not become the artifact's
            shutil.rmtree(staging / SCRATCH_NAME)
        files = tuple(_entries(staging, known))
        manifest = Manifest(
            kind=kind,
            key=key,
            content=content_of(files, shards),
            identity=identity,
            files=files,
            shards=shards,
            stats=stats,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            produced_by=produced_by,
        )
        (staging / MANIFEST_NAME).write_bytes(spelled(manifest))
        fsync_tree(staging)
        return self._place(manifest)

    def _place(self, manifest: Manifest) -> Artifact:
        """Make finished what lies in staging, whole and on disk."""
        kind, key = manifest.kind, manifest.key
        target = self.root / kind / key
        target.parent.mkdir(parents=True, exist_ok=True)
        self.staging(kind, key).rename(target)
        fsync_path(target.parent)
        return Artifact(self.root, manifest, found=False)

    def artifacts(self, kind: str | None = None, *, shards: bool = True) -> Iterator[Artifact]:
        """Every finished artifact, of one kind where named, oldest first; ``shards`` False: of no kind that is a shard."""
        if kind is not None and not KIND.fullmatch(kind):
            raise RefError(f"{self.address}: {kind!r} is no kind of artifact; `seqmill ls` lists what there is")
        kinds = [kind] if kind else [name for name in self.kinds() if shards or not name.endswith("-shard")]
        loaded = self.load_all([(name, key) for name in kinds for key in self.keys(name)])
        return iter(sorted((found for found in loaded if found), key=lambda found: (found.manifest.created, found.ref)))

    def kinds(self) -> list[str]:
        """The kinds that the store has a folder of."""
        return sorted(name for name in _names(self.root) if KIND.fullmatch(name))

    def keys(self, kind: str, prefix: str = "") -> list[Digest]:
        """The names of a kind's folders, those that begin with ``prefix``."""
        return sorted(Digest(name) for name in _names(self.root / kind) if name.startswith(prefix))

    def refs(self) -> list[tuple[str, Digest]]:
        """Every kind and key that should be an artifact."""
        return [(kind, key) for kind in self.kinds() for key in self.keys(kind)]

    def resolve(self, ref: str) -> Artifact:
        """The artifact that ``ref`` names: ``kind`` (its newest), ``kind/key`` or ``key``, where a key may be cut short.

        Raises RefError where nothing, or more than one artifact, answers to it.
        """
        if KIND.fullmatch(ref) and (newest := list(self.artifacts(ref))[-1:]):
            return newest[0]
        kind, _, prefix = ref.partition("/") if "/" in ref else ("", "", ref)
        if kind and not KIND.fullmatch(kind):
            raise RefError(f"{self.address}: {kind!r} is no kind of artifact; `seqmill ls` lists what there is")
        named = [(name, key) for name in ([kind] if kind else self.kinds()) for key in self.keys(name, prefix)]
        matches = [found for found in self.load_all(named[:MOST_LOADED]) if found]
        if len(matches) == 1:
            return matches[0]
        what = f"{len(named)} artifacts begin so" if matches else "no such artifact"
        raise RefError(f"{self.address}: {ref!r}: {what}; `seqmill ls` lists what there is")


def spelled(manifest: Manifest) -> bytes:
    """A manifest as its file has it."""
    return json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False).encode()


def size_problem(path: Path, entry: FileEntry) -> str | None:
    """Where a file is missing, or of another size than its entry says."""
    size = path.stat().st_size if path.is_file() else None
    if size == entry.num_bytes:
        return None
    return f"{entry.name} is {'missing' if size is None else f'{size} bytes'}, its manifest says {entry.num_bytes}"


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except OSError:  # no such folder, or one that is a file
        return []


def is_at(path: Path, handle: int) -> bool:
    """Whether a path still leads to an open file, which somebody may have removed meanwhile."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _entries(staging: Path, known: dict[str, Digest]) -> Iterator[FileEntry]:
    for base, _, names in sorted(os.walk(staging)):
        for name in sorted(names):
            path = Path(base, name)
            relative = path.relative_to(staging).as_posix()
            if relative == MANIFEST_NAME:
                continue
            yield FileEntry(name=relative, num_bytes=path.stat().st_size, digest=known.get(relative) or digest_file(path))
