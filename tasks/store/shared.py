"""A store that many machines share: a bucket, with a folder of this machine as the cache of what is read from it.

Reads and writes  <url>/<kind>/<key>/<digest>/<file>     an artifact's files, each below the digest of its bytes
                  <url>/<kind>/<key>/manifest.json       the commit: put last, and only where none is
                  <url>/.claims, <url>/.damaged          who builds now; manifests of what was set aside
                  <cache>/<kind>/<key>/                  as a local store has it, files as they are asked for

A find is one request for a manifest, and no listing decides anything. Two builders of one key write files to places of
their own, as the digests differ, and one of their manifests stands: an artifact is never a mixture. A file is fetched when
its path is asked for, checked against its digest, and from then on it is a local file like any other.
"""

import contextlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from pydantic import ValidationError

from tasks.errors import SettingsError, StoreError
from tasks.machine import Advance, Progress, quiet
from tasks.store.artifact import MANIFEST_NAME, Artifact, FileEntry, Manifest, ShardEntry
from tasks.store.bucket import SCHEMES, Bucket, Patience
from tasks.store.cache import Cache, cache_folder, forget, is_whole
from tasks.store.claim import claimed
from tasks.store.digest import Digest, digest_bytes, digest_file, digest_json
from tasks.store.lease import passing
from tasks.store.store import KIND, ArtifactStore
from tasks.store.trim import Room

log = logging.getLogger(__name__)

FORM = ".store.json"
# Requests at once where many small ones are made: at 20 ms each, some 800 a second.
NUM_REQUESTS = 16
SHOWN_BYTES = 32 << 20  # a transfer below this is over before a bar is read
DIGEST = re.compile(r"[0-9a-f]{64}")

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class SharedArtifact(Artifact):
    """An artifact of a shared store: to ask for the path of a file fetches the file."""

    store: "SharedStore" = field(kw_only=True, repr=False, compare=False)

    @property
    def path(self) -> Path:
        for entry in self.manifest.files:
            self.store.fetch(self, entry)
        return self.folder

    def file(self, name: str) -> Path:
        return self.store.fetch(self, self.entry(name))

    def read(self, name: str, start: int, num_bytes: int) -> bytes:
        entry = self.entry(name)
        if is_whole(self.folder / entry.name, entry):
            return super().read(name, start, num_bytes)
        data = self.store.bucket.read(_file_name(self.manifest, entry), start, min(num_bytes, entry.num_bytes - start))
        if data is None:
            self.store.lose(self, f"{name} is missing or shorter than its manifest says ({entry.num_bytes} bytes)")
        return bytes(data)

    def shard_file(self, entry: ShardEntry, name: str) -> Path:
        shard = self.store.load(entry.kind, entry.key)
        if shard is None or shard.content != entry.content:
            self.store.lose(self, f"shard {entry.name} ({entry.kind}/{entry.key[:12]}) is {'another' if shard else 'missing'}")
        return shard.file(name)


class SharedStore(ArtifactStore):
    """All artifacts below one URL. Picklable: another process of this machine opens it over the same cache."""

    def __init__(
        self,
        url: str,
        cache: Path,
        *,
        endpoint: str | None = None,
        claim_seconds: float = 60.0,
        patience: Patience | None = None,
        progress: Progress = quiet,
        cache_bytes: int | None = None,
    ) -> None:
        """cache_bytes: what the cache may take, but for what is in use; None: any."""
        if any("@" in urlsplit(address or "").netloc for address in (url, endpoint)):
            raise SettingsError("store: credentials in an address; leave them out, and put them into the environment")
        super().__init__(cache_folder(url, cache, endpoint))
        self.cache, self.bucket = Cache(self.root), Bucket(url, endpoint, patience)
        self.claim_seconds, self.progress = claim_seconds, progress
        self.room = Room(self.root, cache_bytes)
        self._is_checked = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "progress": quiet}  # a bar belongs to the process that shows it

    @property
    def address(self) -> str:
        return self.bucket.url

    def place(self, kind: str, key: Digest) -> str:
        return f"{self.bucket.url}/{_manifest_name(kind, key)}"

    # To find

    def find(self, kind: str, key: Digest) -> Artifact | None:
        artifact = self.load(kind, key)
        return artifact if artifact and not self.damage(artifact) else None

    def load(self, kind: str, key: Digest) -> Artifact | None:
        """The artifact as its manifest tells it, unchecked.

        A shard's is asked for once, any other's every time: a bucket may be cleared.
        """
        known = super().load(kind, key) if kind.endswith("-shard") and self._has(kind, key) else None
        if known:
            return self._artifact(known.manifest)
        manifest = self._standing(kind, key)
        return self._artifact(manifest) if manifest else None

    def _standing(self, kind: str, key: Digest) -> Manifest | None:
        """The manifest that the bucket has now; None where there is none to use."""
        data = self.bucket.get(_manifest_name(kind, key))
        if data is None:
            return None
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError:
            manifest = None
        if manifest is None or (manifest.kind, manifest.key) != (kind, key) or not _is_plain(manifest):
            log.warning("%s: unreadable manifest, or another's; the artifact counts as absent", self.place(kind, key))
            return None
        self.cache.remember(kind, key, data, manifest)
        return manifest

    def damage(self, artifact: Artifact, digests: bool = False) -> str | None:
        """What is wrong with an artifact: with its manifest, or (asked for) with the bytes of its files and its shards.

        Its shards were there before its manifest was put; one that is lost since is found when it is fetched.
        """
        if artifact.key != digest_json(artifact.manifest.identity):
            return "the manifest's key is not the digest of its identity"
        if not digests:
            return None
        found = (self.file_problem(artifact, entry) for entry in artifact.manifest.files)
        return next((problem for problem in found if problem), None) or self._damaged_shard(artifact, digests)

    def file_problem(self, artifact: Artifact, entry: FileEntry, advance: Advance = lambda amount: None) -> str | None:
        """Reads the file from the bucket, cached or not; a cache without it, or with other bytes, keeps what came."""
        path = artifact.folder / entry.name
        with self.cache.fetching(artifact, entry) as partial:
            problem = self._download(artifact, entry, partial, advance)
            if problem is None and not _has_digest(path, entry):
                if is_whole(path, entry):
                    log.warning("%s: has other bytes than the bucket; replaced: check that disk", path)
                self.cache.keep(artifact, entry, partial)
        return problem

    def find_all(self, kind: str, keys: Sequence[Digest]) -> list[Artifact | None]:
        return self._at_once(lambda key: self.find(kind, key), keys)

    def load_all(self, refs: Sequence[tuple[str, Digest]]) -> list[Artifact | None]:
        return self._at_once(lambda ref: self.load(*ref), refs)

    def kinds(self) -> list[str]:
        """The kinds that the bucket lists or the cache knows."""
        return sorted({*super().kinds(), *(name for name in self.bucket.names() if KIND.fullmatch(name))})

    def keys(self, kind: str, prefix: str = "") -> list[Digest]:
        """The keys that the bucket lists or the cache knows; a whole key is taken at its word."""
        if len(prefix) == len(digest_bytes(b"")):
            return [Digest(prefix)]
        listed = {Digest(name) for name in self.bucket.names(kind) if name.startswith(prefix)}
        return sorted({*super().keys(kind, prefix), *listed})

    def learn(self) -> None:
        """Get the manifests of all that is no shard, so that the cache can be asked what is like what."""
        kinds = [kind for kind in self.kinds() if not kind.endswith("-shard")]
        self.load_all([(kind, key) for kind in kinds for key in self.keys(kind) if not self._has(kind, key)])

    # To build

    @contextmanager
    def lock(self, kind: str, key: Digest) -> Iterator[None]:
        """Hold the one builder's place for a key: on this machine by flock(2), among machines by a claim that is renewed."""
        with super().lock(kind, key), claimed(self.bucket, f"{kind}-{key}", self.cache.holder(), self.claim_seconds):
            self._refuse_without_conditions()  # now, not when a day's work is to be committed
            yield

    def restore(self, kind: str, key: Digest) -> Artifact | None:
        """The artifact of a commit that was killed in its upload, or of a cache that has it whole where the bucket lost it."""
        staging = self.root / ".staging" / kind / key
        for folder in (staging, self.root / kind / key):
            try:
                manifest = Manifest.model_validate_json((folder / MANIFEST_NAME).read_bytes())
            except (OSError, ValidationError):
                continue
            is_own = manifest.key == key == digest_json(manifest.identity)
            if is_own and all(_has_digest(folder / entry.name, entry) for entry in manifest.files):
                if self._lost_shards(manifest.shards):
                    return None  # they alone are built
                log.info("%s/%s: built before, and not in the bucket; goes on with the upload", kind, key[:12])
                return replace(self._publish(manifest, folder, is_again=folder == staging), found=True)
        return None

    def set_aside(self, kind: str, key: Digest, problem: str) -> None:
        """Take a damaged artifact's manifest out of its place; what the cache has whole may still be restored."""
        name = _manifest_name(kind, key)
        if data := self.bucket.get(name):
            target = f".damaged/{kind}-{key}-{time.time_ns()}.json"
            self.bucket.put(target, data)
            self.bucket.delete(name)
            log.warning("%s/%s: damaged (%s); set aside in %s/%s", kind, key[:12], problem, self.bucket.url, target)

    def lose(self, artifact: Artifact, problem: str) -> NoReturn:
        """Set aside an artifact that cannot be read, and those that list it. Raises StoreError, always."""
        if self._standing(artifact.kind, artifact.key) in (None, artifact.manifest):  # else it was rebuilt meanwhile
            if artifact.kind.endswith("-shard"):
                self.lose_shard(artifact.kind, artifact.key)  # first: what is set aside halfway is found to be so again
            self.set_aside(artifact.kind, artifact.key, problem)
        shutil.rmtree(artifact.folder, ignore_errors=True)
        raise StoreError(f"{self.place(artifact.kind, artifact.key)}: {problem}; it was set aside: run again to rebuild it")

    def lose_shard(self, kind: str, key: Digest) -> None:
        """Set aside what lists a shard. What a run reads is known to its cache, whatever a listing says."""
        for parent in self.artifacts(kind.removesuffix("-shard")):
            if any(entry.key == key for entry in parent.manifest.shards):
                self.set_aside(parent.kind, parent.key, f"its shard {key[:12]} cannot be read")

    # To fetch

    def fetch(self, artifact: Artifact, entry: FileEntry) -> Path:
        """The path of a file in the cache, fetched and checked where it is not there yet."""
        path = artifact.folder / entry.name
        with passing(self.root):
            self.keep(artifact)  # before it is looked for: from here on no trim takes it
            if is_whole(path, entry):
                return path
        self.room.make(entry.num_bytes)
        with self.cache.fetching(artifact, entry) as partial:
            if is_whole(path, entry):  # by another process while this one waited
                return path
            with self._bar(f"fetch {entry.name}", entry.num_bytes) as advance:
                # Twice, for what came over the line wrong may come right; a bucket's own damage does not.
                problem = self._download(artifact, entry, partial, advance)
                problem = problem and self._download(artifact, entry, partial, advance)
            if problem:
                self.lose(artifact, problem)
            self.cache.keep(artifact, entry, partial)
        return path

    def _download(self, artifact: Artifact, entry: FileEntry, partial: Path, advance: Advance) -> str | None:
        """What is wrong with a file in the bucket, in one line; None where ``partial`` now has its bytes."""
        found = self.bucket.download(_file_name(artifact.manifest, entry), partial, entry.num_bytes, advance)
        if found is None:
            problem = f"{entry.name} is missing or shorter than its manifest says ({entry.num_bytes} bytes)"
        elif found != entry.digest:
            problem = f"{entry.name} has the digest {found[:12]}, its manifest says {entry.digest[:12]}"
        else:
            return None
        forget(partial)
        return problem

    # To commit

    def _place(self, manifest: Manifest) -> Artifact:
        if lost := self._lost_shards(manifest.shards):
            raise StoreError(
                f"{self.place(lost[0].kind, lost[0].key)}: shard {lost[0].name} is gone from the bucket "
                f"({len(lost)} of {len(manifest.shards)} are); run again to rebuild it"
            )
        return self._publish(manifest, self.root / ".staging" / manifest.kind / manifest.key)

    def _publish(self, manifest: Manifest, folder: Path, *, is_again: bool = False) -> Artifact:
        """Upload what is in ``folder``, put the manifest, and make the folder the cache's. The first manifest put is kept.

        is_again: by an upload that was killed, some of it may be there.
        """
        self._refuse_without_conditions()
        self._at_once(lambda entry: self._upload(manifest, entry, folder, is_again), manifest.files)
        if first := self._put_manifest(manifest.kind, manifest.key, (folder / MANIFEST_NAME).read_bytes()):
            log.info("%s/%s: another builder was first; its artifact is kept", manifest.kind, manifest.key[:12])
            shutil.rmtree(folder)
            return self._artifact(first)
        target = self.root / manifest.kind / manifest.key
        if folder != target:
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
            self.room.make(sum(entry.num_bytes for entry in manifest.files))
        return self._artifact(manifest, found=False)

    def _put_manifest(self, kind: str, key: Digest, data: bytes) -> Manifest | None:
        """Commit, unless another builder has: then its manifest."""
        name = _manifest_name(kind, key)
        while not self.bucket.put_new(name, data):
            theirs = self.bucket.get(name)
            if theirs == data:  # our own, by a try whose answer was cut off
                return None
            if theirs is not None and (first := self._standing(kind, key)):
                return first
            self.set_aside(kind, key, "its manifest cannot be used")
        return None

    def _upload(self, manifest: Manifest, entry: FileEntry, folder: Path, is_again: bool) -> None:
        name = _file_name(manifest, entry)
        # An object appears whole, and its name is the digest of its bytes. One that was there before may be the damaged one
        # for whose sake all this is built again.
        if is_again and entry.num_bytes >= SHOWN_BYTES and self.bucket.num_bytes(name) == entry.num_bytes:
            return
        with self._bar(f"upload {entry.name}", entry.num_bytes) as advance:
            self.bucket.upload(folder / entry.name, name, advance)

    def _lost_shards(self, entries: Sequence[ShardEntry]) -> list[ShardEntry]:
        """The shards to be listed that the bucket has not, once those that the cache has whole are uploaded; forgets them."""

        def restore(entry: ShardEntry) -> ShardEntry | None:
            if self.bucket.num_bytes(_manifest_name(entry.kind, entry.key)) is not None:
                return None
            return None if self.restore(entry.kind, entry.key) else entry

        lost = [entry for entry in self._at_once(restore, entries) if entry]
        for entry in lost:
            shutil.rmtree(self.root / entry.kind / entry.key, ignore_errors=True)
        return lost

    def _refuse_without_conditions(self) -> None:
        """Raise StoreError where the server takes a second object of a name that was to be new: builders would not be apart."""
        if self._is_checked:
            return
        data = b'{"form": 1}'
        if self.bucket.put_new(FORM, data) and self.bucket.put_new(FORM, data):
            raise StoreError(
                f"{self.bucket.url}: the server ignores If-None-Match, so that two builders could tear an artifact; "
                "use one that knows conditional writes, or a shared folder as the store"
            )
        self._is_checked = True

    # The cache

    def _artifact(self, manifest: Manifest, *, found: bool = True) -> SharedArtifact:
        return SharedArtifact(self.root, manifest, found, store=self)

    def _has(self, kind: str, key: Digest) -> bool:
        return (self.root / kind / key / MANIFEST_NAME).exists()

    def _bar(self, label: str, num_bytes: int) -> contextlib.AbstractContextManager[Advance]:
        return (self.progress if num_bytes >= SHOWN_BYTES else quiet)(label, num_bytes, "B")

    def _at_once(self, function: Callable[[A], B], items: Sequence[A]) -> list[B]:
        if len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(NUM_REQUESTS, thread_name_prefix="requests") as pool:
            return list(pool.map(function, items))


def is_url(store: str) -> bool:
    """Whether a store's address is that of a shared one."""
    return store.partition("://")[0] in SCHEMES and "://" in store


def store_of(artifact: Artifact) -> ArtifactStore:
    """The store that an artifact is of, in whichever process it arrived."""
    return artifact.store if isinstance(artifact, SharedArtifact) else ArtifactStore(artifact.root)


def _is_plain(manifest: Manifest) -> bool:
    """Whether all that becomes a path leads into its folder: a bucket is written by others."""
    files = [PurePosixPath(entry.name) for entry in manifest.files]
    if any(path.is_absolute() or ".." in path.parts or path.name in ("", MANIFEST_NAME) for path in files):
        return False
    digests = [entry.digest for entry in manifest.files] + [entry.key for entry in manifest.shards]
    return all(map(DIGEST.fullmatch, digests)) and all(KIND.fullmatch(entry.kind) for entry in manifest.shards)


def _manifest_name(kind: str, key: Digest) -> str:
    return f"{kind}/{key}/{MANIFEST_NAME}"


def _file_name(manifest: Manifest, entry: FileEntry) -> str:
    return f"{manifest.kind}/{manifest.key}/{entry.digest}/{entry.name}"


def _has_digest(path: Path, entry: FileEntry) -> bool:
    return is_whole(path, entry) and digest_file(path) == entry.digest
