"""A store that many machines share: a bucket, with a folder of this machine as the cache of what is read from it.

Reads and writes  <url>/<kind>/<key>/<place>/<file>      an artifact's files, in a place of the build's own
                  <url>/<kind>/<key>/manifest.json       the commit: put last, and only where none is
                  <url>/.claims, <url>/.damaged          who builds now; manifests of what was set aside
                  <url>/.leases, .trash, .fates          what is used, and what the collector took (tasks.store.collect)
                  <cache>/<kind>/<key>/                  as a local store has it, files as they are asked for

A find is one request for a manifest, and no listing decides anything. Two builders of one key write files to places of
their own, and one of their manifests stands: an artifact is never a mixture. A file is fetched when
its path is asked for, checked against its digest, and from then on it is a local file like any other.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from pydantic import ValidationError

from tasks.errors import SettingsError, StoreError
from tasks.machine import Advance, Progress, quiet
from tasks.store.artifact import MANIFEST_NAME, Artifact, FileEntry, Manifest, ShardEntry
from tasks.store.bucket import Bucket, Patience
from tasks.store.cache import Cache, cache_folder, download, has_digest, is_whole
from tasks.store.claim import boot_seconds, claimed
from tasks.store.digest import Digest, digest_bytes, digest_json
from tasks.store.fate import DAMAGED, SURE_SECONDS, decide, put_back, sentence_of, was_committed
from tasks.store.fetched import SharedArtifact
from tasks.store.layout import DIGEST, manifest_name, moved, placed, read_manifest
from tasks.store.lease import passing
from tasks.store.notes import BucketNotes, Notes
from tasks.store.publish import SHOWN_BYTES, Publisher
from tasks.store.store import KIND, ArtifactStore, spelled
from tasks.store.trim import Room
from tasks.store.uses import use

log = logging.getLogger(__name__)

# Requests at once where many small ones are made: at 20 ms each, some 800 a second.
NUM_REQUESTS = 16

A = TypeVar("A")
B = TypeVar("B")


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
        sure_seconds: float = SURE_SECONDS,
    ) -> None:
        """cache_bytes: what the cache may take, but for what is in use; None: any. sure_seconds: see tasks.store.fate."""
        if any("@" in urlsplit(address or "").netloc for address in (url, endpoint)):
            raise SettingsError("store: credentials in an address; leave them out, and put them into the environment")
        super().__init__(cache_folder(url, cache, endpoint))
        self.cache, self.bucket = Cache(self.root), Bucket(url, endpoint, patience)
        self.claim_seconds, self.progress, self.sure_seconds = claim_seconds, progress, sure_seconds
        self.room = Room(self.root, cache_bytes)
        self._publisher = Publisher(self.bucket, sure_seconds)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "progress": quiet}  # a bar belongs to the process that shows it

    @property
    def notes(self) -> Notes:
        return BucketNotes(self.bucket)

    @property
    def address(self) -> str:
        return self.bucket.url

    def place(self, kind: str, key: Digest) -> str:
        return f"{self.bucket.url}/{manifest_name(kind, key)}"

    # To find

    def find(self, kind: str, key: Digest) -> Artifact | None:
        known = self._known(kind, key)
        if known and not all(is_whole(self.cache.folder(known) / entry.name, entry) for entry in known.files):
            known = None  # what the cache heard of may be collected since, and it could not give it back
        manifest = known or self._standing(kind, key)
        artifact = self._artifact(manifest) if manifest else None
        if artifact is None or self.damage(artifact):
            return None
        self.use(artifact)
        return artifact

    def use(self, artifact: Artifact) -> None:
        """Tell the collector, soon, that this process uses an artifact. Its shards are used with it."""
        if not artifact.kind.endswith("-shard"):
            use(self.bucket, artifact.ref)

    def load(self, kind: str, key: Digest) -> Artifact | None:
        """The artifact as its manifest tells it, unchecked.

        A shard's is asked for once, any other's every time: a bucket may be cleared.
        """
        known = self._known(kind, key)
        return self._artifact(known) if known else self.ask(kind, key)

    def ask(self, kind: str, key: Digest) -> Artifact | None:
        """The artifact as the bucket has it now, whatever this machine has heard of it."""
        manifest = self._standing(kind, key)
        return self._artifact(manifest) if manifest else None

    def _known(self, kind: str, key: Digest) -> Manifest | None:
        """A shard's manifest as the cache has it."""
        known = super().load(kind, key) if kind.endswith("-shard") and self._has(kind, key) else None
        return known.manifest if known else None

    def _standing(self, kind: str, key: Digest) -> Manifest | None:
        """The manifest that the bucket has now; None where there is none to use."""
        data = self.bucket.get(manifest_name(kind, key))
        return None if data is None else self.keep_manifest(kind, key, data)

    def keep_manifest(self, kind: str, key: Digest, data: bytes, *, is_strict: bool = False) -> Manifest | None:
        """A manifest that the bucket has, kept in the cache, too; None for one that is not to be used.

        is_strict: raises StoreError where the cache cannot be written, which is passed over otherwise.
        """
        if manifest := read_manifest(kind, key, data):
            self.cache.remember(kind, key, data, manifest, is_strict=is_strict)
        else:
            log.warning("%s: unreadable manifest, or another's; the artifact counts as absent", self.place(kind, key))
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
            problem = download(self.bucket, artifact, entry, partial, advance)
            if problem is None and not has_digest(path, entry):
                if is_whole(path, entry):
                    log.warning("%s: has other bytes than the bucket; replaced: check that disk", path)
                self.cache.keep(artifact, entry, partial)
        again = self._elsewhere(artifact, entry) if problem else None
        return self.file_problem(again, entry, advance) if again else problem

    def find_all(self, kind: str, keys: Sequence[Digest]) -> list[Artifact | None]:
        return self.at_once(lambda key: self.find(kind, key), keys)

    def load_all(self, refs: Sequence[tuple[str, Digest]], *, is_anew: bool = False) -> list[Artifact | None]:
        return self.at_once(lambda ref: self.ask(*ref) if is_anew else self.load(*ref), refs)

    def kinds(self) -> list[str]:
        """The kinds that the bucket lists or the cache knows."""
        return sorted({*super().kinds(), *(name for name in self.bucket.names() if KIND.fullmatch(name))})

    def keys(self, kind: str, prefix: str = "") -> list[Digest]:
        """The keys that the bucket lists or the cache knows; a whole key is taken at its word."""
        if len(prefix) == len(digest_bytes(b"")):
            return [Digest(prefix)]
        listed = {Digest(name) for name in self.bucket.names(kind) if name.startswith(prefix) and DIGEST.fullmatch(name)}
        return sorted({*filter(DIGEST.fullmatch, super().keys(kind, prefix)), *listed})

    def refs(self) -> list[tuple[str, Digest]]:
        """What has a manifest in the bucket, as it is listed now: a cache may know of what was collected since."""
        kinds = sorted(name for name in self.bucket.names() if KIND.fullmatch(name))
        names = (one.name.split("/") for kind in kinds for one in self.bucket.objects(kind))
        return [(name[0], Digest(name[1])) for name in names if name[2:] == [MANIFEST_NAME] and DIGEST.fullmatch(name[1])]

    def learn(self) -> None:
        """Get the manifests of all that is no shard, so that the cache can be asked what is like what."""
        kinds = [kind for kind in self.kinds() if not kind.endswith("-shard")]
        self.load_all([(kind, key) for kind in kinds for key in self.keys(kind) if not self._has(kind, key)])

    # To build

    @contextmanager
    def lock(self, kind: str, key: Digest) -> Iterator[None]:
        """Hold the one builder's place for a key: on this machine by flock(2), among machines by a claim that is renewed."""
        with super().lock(kind, key), claimed(self.bucket, f"{kind}-{key}", self.cache.holder(), self.claim_seconds):
            self.publisher.check()  # now, not when a day's work is to be committed
            yield

    def restore(self, kind: str, key: Digest) -> Artifact | None:
        """The artifact out of the trash, of a commit that was killed in its upload, or of a cache that has it whole."""
        if rescued := self.rescue(kind, key):
            self.use(rescued)
            return rescued
        staging = self.root / ".staging" / kind / key
        for told in (staging, self.root / kind / key):
            try:
                manifest = Manifest.model_validate_json((told / MANIFEST_NAME).read_bytes())
            except (OSError, ValidationError):
                continue
            folder = staging if told == staging else self.cache.folder(manifest)
            is_own = manifest.key == key == digest_json(manifest.identity)
            if is_own and all(has_digest(folder / entry.name, entry) for entry in manifest.files):
                checked = boot_seconds()
                if self._lost_shards(manifest.shards):
                    return None  # they alone are built
                log.info("%s/%s: built before, and not in the bucket; goes on with the upload", kind, key[:12])
                # What the bucket lost is not where it was: a collector may be deleting there. So may it where something was sent
                # and committed, without an answer; or it was found damaged there.
                is_staged = folder == staging and not was_committed(self.bucket, kind, key)
                again = manifest if is_staged else moved(manifest)
                return replace(self._publish(again, folder, checked, is_again=is_staged), found=True)
        return None

    def rescue(self, kind: str, key: Digest) -> Artifact | None:
        """The artifact out of the bucket's trash, with its shards; None where it is not there, or is being deleted."""
        begun = boot_seconds()
        sentence = sentence_of(self.bucket, kind, key)
        if sentence is None or not decide(self.bucket, sentence.number, "kept"):
            return None
        manifest = self.keep_manifest(kind, key, sentence.data)
        if manifest is None or self._lost_shards(manifest.shards) or boot_seconds() - begun > self.sure_seconds:
            return None
        put_back(self.bucket, kind, key, sentence)
        log.info("%s/%s: taken back out of the trash", kind, key[:12])
        return self.load(kind, key)

    def set_aside(self, kind: str, key: Digest, problem: str) -> None:
        """Take a damaged artifact's manifest out of its place; what the cache has whole may still be restored."""
        name = manifest_name(kind, key)
        if data := self.bucket.get(name):
            target = f"{DAMAGED}/{kind}-{key}-{time.time_ns()}.json"
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
        self.use(artifact)
        with passing(self.root):
            self.keep(artifact)  # before it is looked for: from here on no trim takes it
            with contextlib.suppress(OSError):  # a cache that cannot be written is told of when a file is to be fetched
                self.cache.own(artifact.kind, artifact.key, artifact.content)
            path = artifact.folder / entry.name
            if is_whole(path, entry):
                return path
        self.room.make(entry.num_bytes)
        with self.cache.fetching(artifact, entry) as partial:
            if is_whole(path, entry):  # by another process while this one waited
                return path
            with self._bar(f"fetch {entry.name}", entry.num_bytes) as advance:
                # Twice, for what came over the line wrong may come right; a bucket's own damage does not.
                problem = download(self.bucket, artifact, entry, partial, advance)
                problem = problem and download(self.bucket, artifact, entry, partial, advance)
            if problem is None:
                self.cache.keep(artifact, entry, partial)
                return path
        if (again := self._elsewhere(artifact, entry)) is None:
            self.lose(artifact, problem)
        return self.fetch(again, entry)

    def _elsewhere(self, artifact: Artifact, entry: FileEntry) -> Artifact | None:
        """The artifact with the same file, where it was collected and built anew since this cache heard of it."""
        standing = self._standing(artifact.kind, artifact.key)
        if standing is None or standing == artifact.manifest or entry not in standing.files:
            return None
        return self._artifact(standing)

    # To commit

    def commit(
        self,
        identity: dict[str, Any],
        shards: tuple[ShardEntry, ...],
        stats: dict[str, Any],
        produced_by: dict[str, Any],
        known: dict[str, Digest],
    ) -> Artifact:
        return super().commit(identity, shards, stats, placed(produced_by), known)

    def _place(self, manifest: Manifest) -> Artifact:
        checked = boot_seconds()
        self._refuse_lost(manifest)
        return self._publish(manifest, self.root / ".staging" / manifest.kind / manifest.key, checked)

    def _refuse_lost(self, manifest: Manifest) -> None:
        if lost := self._lost_shards(manifest.shards):
            raise StoreError(
                f"{self.place(lost[0].kind, lost[0].key)}: shard {lost[0].name} is gone from the bucket "
                f"({len(lost)} of {len(manifest.shards)} are); run again to rebuild it"
            )

    def _publish(self, manifest: Manifest, folder: Path, checked: float, *, is_again: bool = False) -> Artifact:
        """Upload what is in ``folder``, put the manifest, and make the folder the cache's. The first manifest put is kept.

        checked: when its shards were looked at. is_again: by an upload that was killed, some of it may be there.
        """
        manifest = self.publisher.send(manifest, folder, self.at_once, self._bar, is_again=is_again)
        if boot_seconds() - checked > self.sure_seconds:
            self._refuse_lost(manifest)
        data = spelled(manifest)
        if first := self._put_manifest(manifest.kind, manifest.key, data):
            log.info("%s/%s: another builder was first; its artifact is kept", manifest.kind, manifest.key[:12])
            if folder.is_relative_to(self.root / ".staging"):  # what lies in the cache may be in use
                shutil.rmtree(folder)
            return self._artifact(first)
        self.use(self._artifact(manifest))
        if self.cache.take(folder, manifest, data):
            self.room.make(sum(entry.num_bytes for entry in manifest.files))
        return self._artifact(manifest, found=False)

    def _put_manifest(self, kind: str, key: Digest, data: bytes) -> Manifest | None:
        """Commit, unless another builder has: then its manifest."""
        name = manifest_name(kind, key)
        while not self.bucket.put_new(name, data):
            theirs = self.bucket.get(name)
            if theirs == data:  # our own, by a try whose answer was cut off
                return None
            if theirs is not None and (first := self._standing(kind, key)):
                return first
            self.set_aside(kind, key, "its manifest cannot be used")
        return None

    def _lost_shards(self, entries: Sequence[ShardEntry]) -> list[ShardEntry]:
        """The shards to be listed that the bucket has not, or has otherwise, once those that the cache has whole are uploaded."""

        def restore(entry: ShardEntry) -> ShardEntry | None:
            found = self.ask(entry.kind, entry.key) or self.restore(entry.kind, entry.key)
            if found is None:
                shutil.rmtree(self.root / entry.kind / entry.key, ignore_errors=True)
            return None if found and found.content == entry.content else entry

        return [entry for entry in self.at_once(restore, entries) if entry]

    @property
    def publisher(self) -> Publisher:
        """Of the bucket that the store has now."""
        if self._publisher.bucket is not self.bucket:
            self._publisher = Publisher(self.bucket, self.sure_seconds)
        return self._publisher

    # The cache

    def _artifact(self, manifest: Manifest, *, found: bool = True) -> SharedArtifact:
        return SharedArtifact(self.root, manifest, found, store=self)

    def _has(self, kind: str, key: Digest) -> bool:
        return (self.root / kind / key / MANIFEST_NAME).exists()

    def _bar(self, label: str, num_bytes: int) -> contextlib.AbstractContextManager[Advance]:
        return (self.progress if num_bytes >= SHOWN_BYTES else quiet)(label, num_bytes, "B")

    def at_once(self, function: Callable[[A], B], items: Sequence[A]) -> list[B]:
        """What ``function`` returns for every item, in order, many requests at a time."""
        if len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(NUM_REQUESTS, thread_name_prefix="requests") as pool:
            return list(pool.map(function, items))


def store_of(artifact: Artifact) -> ArtifactStore:
    """The store that an artifact is of, in whichever process it arrived."""
    if isinstance(artifact, SharedArtifact):
        assert isinstance(artifact.store, SharedStore)
        return artifact.store
    return ArtifactStore(artifact.root)
