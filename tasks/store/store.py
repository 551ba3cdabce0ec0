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
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks.errors import RefError, StoreError
from tasks.store.artifact import MANIFEST_NAME, Artifact, FileEntry, Manifest, ShardEntry, content_of
from tasks.store.digest import Digest, DigestMemory, digest_file, digest_json, fsync_path, fsync_tree
from tasks.store.lease import passing
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

    def find(self, kind: str, key: Digest) -> Artifact | None:
        """The artifact, if it is there whole by its sizes; None where it is absent or damaged."""
        with passing(self.root):
            artifact = self.load(kind, key)
            if artifact is None or self.damage(artifact):
                return None
            self.keep(artifact)
            return artifact

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
        return Artifact(self.root, manifest, found=True)

    def damage(self, artifact: Artifact, digests: bool = False) -> str | None:
        """What is wrong with an artifact, in one line: a missing file, another size, or (asked for) another digest."""
        if artifact.key != digest_json(artifact.manifest.identity):
            return "the manifest's key is not the digest of its identity"
        for entry in artifact.manifest.files:
            path = artifact.path / entry.name
            size = path.stat().st_size if path.is_file() else None
            if size != entry.num_bytes:
                return f"{entry.name} is {'missing' if size is None else f'{size} bytes'}, its manifest says {entry.num_bytes}"
            if digests and digest_file(path) != entry.digest:
                return f"{entry.name} has another digest than its manifest says"
        return self._damaged_shard(artifact, digests)

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
                if not _is_at(path, handle.fileno()):
                    continue  # `seqmill gc` removed the file between the opening and the lock
                yield
                return

    def staging(self, kind: str, key: Digest) -> Path:
        """The folder in which an artifact is built, made if absent, as an earlier try left it."""
        path = self.root / ".staging" / kind / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def restore(self, kind: str, key: Digest) -> Artifact | None:
        """The artifact out of the trash, whole, in its place again; None where it is not there. Call it under the lock."""
        with passing(self.root):
            for path in sorted(self.root.glob(f"{TRASH}/[0-9]*/{kind}/{key}"), reverse=True):
                (self.root / kind).mkdir(exist_ok=True)
                path.rename(self.root / kind / key)
                log.info("%s/%s: taken back out of the trash", kind, key[:12])
                return self.find(kind, key)
        return None

    def set_aside(self, kind: str, key: Digest, problem: str) -> None:
        """Move a damaged artifact out of the way, whole, for a person to look at. Call it under the lock."""
        source = self.root / kind / key
        target = self.root / ".damaged" / f"{kind}-{key}-{time.time_ns()}"
        target.parent.mkdir(parents=True, exist_ok=True)
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
        staging, target = self.staging(kind, key), self.root / kind / key
        shutil.rmtree(staging / SCRATCH_NAME, ignore_errors=True)
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
        (staging / MANIFEST_NAME).write_text(json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False))
        fsync_tree(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(target)
        fsync_path(target.parent)
        return Artifact(self.root, manifest, found=False)

    def artifacts(self, kind: str | None = None, *, shards: bool = True) -> Iterator[Artifact]:
        """Every finished artifact, of one kind where named, oldest first; ``shards`` False: of no kind that is a shard."""
        if kind is not None and not KIND.fullmatch(kind):
            raise RefError(f"{self.root}: {kind!r} is no kind of artifact; `seqmill ls` lists what there is")
        kinds = [kind] if kind else [name for name in self.kinds() if shards or not name.endswith("-shard")]
        loaded = (self.load(name, key) for name in kinds for key in self.keys(name))
        return iter(sorted((found for found in loaded if found), key=lambda found: (found.manifest.created, found.ref)))

    def kinds(self) -> list[str]:
        """The kinds that the store has a folder of."""
        return sorted(name for name in _names(self.root) if KIND.fullmatch(name))

    def keys(self, kind: str, prefix: str = "") -> list[Digest]:
        """The names of a kind's folders, those that begin with ``prefix``."""
        return sorted(Digest(name) for name in _names(self.root / kind) if name.startswith(prefix))

    def resolve(self, ref: str) -> Artifact:
        """The artifact that ``ref`` names: ``kind`` (its newest), ``kind/key`` or ``key``, where a key may be cut short.

        Raises RefError where nothing, or more than one artifact, answers to it.
        """
        if KIND.fullmatch(ref) and (newest := list(self.artifacts(ref))[-1:]):
            return newest[0]
        kind, _, prefix = ref.partition("/") if "/" in ref else ("", "", ref)
        if kind and not KIND.fullmatch(kind):
            raise RefError(f"{self.root}: {kind!r} is no kind of artifact; `seqmill ls` lists what there is")
        named = [(name, key) for name in ([kind] if kind else self.kinds()) for key in self.keys(name, prefix)]
        matches = [found for name, key in named[:MOST_LOADED] if (found := self.load(name, key))]
        if len(matches) == 1:
            return matches[0]
        what = f"{len(named)} artifacts begin so" if matches else "no such artifact"
        raise RefError(f"{self.root}: {ref!r}: {what}; `seqmill ls` lists what there is")


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except OSError:  # no such folder, or one that is a file
        return []


def _is_at(path: Path, handle: int) -> bool:
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
