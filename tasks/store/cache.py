"""The folder of this machine in which a shared store keeps what it has read.

Reads and writes  <cache>/<kind>/<key>/   as a local store has it: the manifest once it is known, files once they are fetched
                  <cache>/<kind>/<key>.<content>/   files of another build of the key than the one whose files came first
                  <cache>/.locks/<kind>-<key>       how the content begins of the build whose files came first
                  <cache>/.fetching       files on their way, and what a killed fetch left of them
                  <cache>/.holder         the name of the folder, as claims tell it
"""

import contextlib
import fcntl
import os
import platform
import re
import secrets
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import orjson

from tasks.errors import StoreError
from tasks.machine import Advance
from tasks.store.artifact import MANIFEST_NAME, Artifact, FileEntry, Manifest
from tasks.store.bucket import Bucket
from tasks.store.digest import Digest, digest_bytes, digest_file, fsync_path, write_atomically
from tasks.store.layout import DIGEST, file_name
from tasks.store.store import KIND, is_at

BUILD_CHARACTERS = 16  # of a content, by which builds of one key are told apart
FETCHING, HOLDER = ".fetching", ".holder"
COPY = re.compile(rf"({KIND.pattern})/({DIGEST.pattern})(?:\.([0-9a-f]{{{BUILD_CHARACTERS}}}))?(?:/(.*))?")


class Cache:
    """One bucket's cache folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def remember(self, kind: str, key: Digest, data: bytes, manifest: Manifest, *, is_strict: bool = False) -> None:
        """Keep a manifest. A cache that cannot be written asks again; is_strict: raises StoreError."""
        try:
            self._remember(self.root / kind / key / MANIFEST_NAME, data, manifest)
        except OSError as error:
            if is_strict:
                raise StoreError(
                    f"{error.filename or self.root}: {error.strerror or error}; mend that, or name another cache in SEQMILL_CACHE"
                ) from error

    def _remember(self, path: Path, data: bytes, manifest: Manifest) -> None:
        if path.exists():
            if (known := path.read_bytes()) == data:
                return
            self._own_unnoted(manifest.kind, manifest.key, known)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not waited for until it is on disk: one that a power cut takes is asked for again, and there may be 100,000.
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            partial.write_bytes(data)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        _date(path.parent, manifest)

    def take(self, folder: Path, manifest: Manifest, data: bytes) -> bool:
        """Make a folder the copy of its build, with ``data`` as the manifest; False where it was that already."""
        self.own(manifest.kind, manifest.key, manifest.content)
        target = self.folder(manifest)
        if is_new := folder != target:
            if target == self.root / manifest.kind / manifest.key:
                write_atomically(folder / MANIFEST_NAME, data)
            else:
                (folder / MANIFEST_NAME).unlink()  # the key's own folder is to have it
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
        self.remember(manifest.kind, manifest.key, data, manifest)
        return is_new

    def folder(self, manifest: Manifest) -> Path:
        """Where the files of a build are, or will be: in the key's own folder, unless those of another build came there first.

        Two builds of one key may have other bytes under the same names, and a path that was given out may be opened much later.
        """
        build = manifest.content[:BUILD_CHARACTERS]
        is_home = self._owner(manifest.kind, manifest.key) in (None, build)
        return self.root / manifest.kind / (manifest.key if is_home else f"{manifest.key}.{build}")

    def told(self, path: str) -> str:
        """A path below the cache as other machines are told of it, with the build whose files lie there."""
        found = COPY.fullmatch(path)
        if found is None or found[3] or (owner := self._owner(found[1], found[2])) is None:
            return path
        return "/".join(part for part in (found[1], f"{found[2]}.{owner}", found[4]) if part)

    def here(self, path: str) -> str:
        """Where this machine has, or will have, what another tells of so."""
        found = COPY.fullmatch(path)
        if found is None or not found[3]:
            return path
        self.own(found[1], found[2], found[3])
        is_home = self._owner(found[1], found[2]) == found[3]
        return "/".join(part for part in (found[1], found[2] if is_home else f"{found[2]}.{found[3]}", found[4]) if part)

    def own(self, kind: str, key: str, content: str) -> None:
        """Note of which build the files in the key's own folder are, unless that is noted: the first word stands.

        It is dropped with the lock file, by a trim of what no living process has used.
        """
        path = self.root / ".locks" / f"{kind}-{key}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as note:
            if os.fstat(note.fileno()).st_size == 0:
                note.write(content[:BUILD_CHARACTERS].encode())  # appended, all at once

    def _owner(self, kind: str, key: str) -> str | None:
        try:
            with (self.root / ".locks" / f"{kind}-{key}").open("rb", buffering=0) as note:
                build = note.read(BUILD_CHARACTERS) or b""
        except OSError:
            return None
        return build.decode() if len(build) == BUILD_CHARACTERS else None

    def _own_unnoted(self, kind: str, key: str, known: bytes) -> None:
        """Files that came before there were notes are those of the manifest that lies beside them."""
        if self._owner(kind, key) is None and sum(1 for _ in (self.root / kind / key).iterdir()) > 1:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self.own(kind, key, str(orjson.loads(known)["content"]))

    def holder(self) -> str:
        """The name of this cache folder on this machine, by which a builder knows an earlier process of its own."""
        path = self.root / HOLDER
        if not path.exists():
            own = self.root / f"{HOLDER}-{uuid.uuid4().hex}"
            write_atomically(own, own.name.encode())
            with contextlib.suppress(FileExistsError):
                os.link(own, path)
            own.unlink()
        # The host too: a cache on a mounted home folder is no machine's own, and flock(2) may not hold there.
        return f"{path.read_text()} {platform.node()}"

    @contextmanager
    def fetching(self, artifact: Artifact, entry: FileEntry) -> Iterator[Path]:
        """The place of a file that is being fetched, held by one process; what a killed one left is gone on with."""
        partial = self.root / FETCHING / f"{artifact.kind}-{artifact.key[:16]}-{entry.digest[:16]}"
        lock = partial.with_name(f"{partial.name}.lock")
        try:
            while True:
                lock.parent.mkdir(parents=True, exist_ok=True)
                with lock.open("a") as handle:
                    fcntl.flock(handle, fcntl.LOCK_EX)
                    if not is_at(lock, handle.fileno()):
                        continue  # removed by the one before
                    yield partial
                    forget(partial)
                    lock.unlink()
                    return
        except OSError as error:
            raise StoreError(
                f"{error.filename or partial}: {error.strerror or error}; mend that, or name another cache in SEQMILL_CACHE"
            ) from error

    def keep(self, artifact: Artifact, entry: FileEntry, partial: Path) -> None:
        """Give a file that was fetched, and found right, its place."""
        fsync_path(partial)
        self.own(artifact.kind, artifact.key, artifact.content)
        folder = self.folder(artifact.manifest)
        path = folder / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(path)
        _date(folder, artifact.manifest)


def cache_folder(url: str, cache: Path, endpoint: str | None = None) -> Path:
    """The folder below ``cache`` that belongs to one URL: what one bucket has, another may not."""
    url = url.rstrip("/")
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", url.partition("://")[2]).strip("-")
    digest = digest_bytes(" ".join([url, endpoint or ""]).encode())
    return cache.expanduser().absolute() / f"{readable}-{digest[:8]}"


def forget(partial: Path) -> None:
    """Remove a file on its way, and the notes on it."""
    for left in (partial, partial.with_name(f"{partial.name}.ranges")):
        left.unlink(missing_ok=True)


def is_whole(path: Path, entry: FileEntry) -> bool:
    """Whether a file is there, by its size: what was fetched was checked, and on disk before it got its name."""
    return path.is_file() and path.stat().st_size == entry.num_bytes


def has_digest(path: Path, entry: FileEntry) -> bool:
    """Whether a file is there with the bytes that its entry says, read through."""
    return is_whole(path, entry) and digest_file(path) == entry.digest


def download(bucket: Bucket, artifact: Artifact, entry: FileEntry, partial: Path, advance: Advance) -> str | None:
    """What is wrong with a file in the bucket, in one line; None where ``partial`` now has its bytes."""
    found = bucket.download(file_name(artifact.manifest, entry), partial, entry.num_bytes, advance)
    if found is None:
        problem = f"{entry.name} is missing or shorter than its manifest says ({entry.num_bytes} bytes)"
    elif found != entry.digest:
        problem = f"{entry.name} has the digest {found[:12]}, its manifest says {entry.digest[:12]}"
    else:
        return None
    forget(partial)
    return problem


def _date(folder: Path, manifest: Manifest) -> None:
    """Give a cached artifact's folder the time of its build, from which what was found is told from what was built."""
    built = datetime.fromisoformat(manifest.created).timestamp()
    os.utime(folder, (built, built))
