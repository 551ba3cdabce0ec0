"""The checkpoints of one training in a bucket: whole or not there, as one object says, which is put last.

Reads and writes  <url>/.checkpoints/<kind>/<key>/kept.json                           manifests of the whole ones, newest first
                  <url>/.checkpoints/<kind>/<key>/checkpoint-<step>/<digest>/<name>   parts, and the metrics up to that step

No listing says what is whole: listings find leftovers. See docs/decisions/0025.
"""

import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson

from tasks.errors import StoreError
from tasks.machine import Advance
from tasks.store import Digest, SharedStore, Work, digest_bytes, digest_json, write_atomically
from tasks.store.bucket import Bucket
from tasks.store.digest import fsync_path
from tasks.training.checkpoints import MANIFEST_NAME, NUM_KEPT, file_problem

log = logging.getLogger(__name__)

FOLDER, KEPT, SIGN = ".checkpoints", "kept.json", "sign"
METRICS = "metrics.jsonl"
FETCHED = ".fetched"  # ends the name of a file that is on its way here
# Parts that are sent or fetched at once; each is cut into four ranges that are under way at once.
NUM_PARTS = 4
NUM_REQUESTS = 16

# Of safetensors: 100 MB is the format's own limit for a header.
LENGTH_BYTES, MOST_HEADER_BYTES = 8, 100_000_000

# All that becomes a path: a bucket, and what another node says, is written by others.
NAME = re.compile(r"[a-z][a-z0-9_-]*\.(safetensors|json)")
DIGEST = re.compile(r"[0-9a-f]{64}")
KIND = re.compile(r"[a-z][a-z-]*")

Files = Mapping[str, Mapping[str, Any]]  # by name: "num_bytes", "digest"

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Kept:
    """A checkpoint that is whole in the bucket. metrics: size and digest of the reports up to its step."""

    manifest: dict[str, Any]  # as the checkpoint's folder has it
    metrics: dict[str, Any]

    @property
    def step(self) -> int:
        step: int = self.manifest["facts"]["step"]
        return step

    @property
    def files(self) -> Files:
        files: Files = self.manifest["files"]
        return files

    def objects(self) -> set[str]:
        """The names, below the training's folder, of all that it consists of."""
        return part_objects(self.step, {**self.files, METRICS: self.metrics})


def check_manifest(manifest: Any) -> dict[str, Any]:
    """A manifest that came from elsewhere. Raises ValueError unless it is one, and all its names are plain."""
    try:
        body = {"facts": manifest["facts"], "files": manifest["files"]}
        is_right = manifest["digest"] == digest_json(body) and isinstance(body["facts"]["step"], int)
        check_files(body["files"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no {error}") from error
    if not is_right:
        raise ValueError("its digest is another")
    return {**body, "digest": manifest["digest"]}


def check_files(files: Files) -> Files:
    """Sizes and digests by name that came from elsewhere. Raises ValueError for what could lead out of a folder."""
    for name, entry in files.items():
        if not (NAME.fullmatch(name) and DIGEST.fullmatch(entry["digest"]) and isinstance(entry["num_bytes"], int)):
            raise ValueError(f"{name!r} is no part of a checkpoint")
    return files


class RemoteCheckpoints:
    """What a bucket has of one artifact's checkpoints. One process at a time keeps them: the artifact's builder."""

    def __init__(self, store: SharedStore, kind: str, key: str) -> None:
        self.store, self.bucket, self.kind, self.key = store, store.bucket, kind, key
        self.folder = f"{FOLDER}/{kind}/{key}"
        self._known: set[bytes | None] = set()  # what kept.json may be, by what this process last read or put

    @property
    def address(self) -> str:
        """What a person deletes to be rid of them."""
        return f"{self.bucket.url}/{self.folder}"

    def kept(self) -> list[Kept]:
        """The whole checkpoints, newest first. Raises StoreError where the bucket does not answer, or with nothing of ours."""
        data = self.bucket.get(f"{self.folder}/{KEPT}")
        self._known = {data}
        if data is None:
            return []
        try:
            return [Kept(check_manifest(one["manifest"]), _checked_metrics(one["metrics"])) for one in orjson.loads(data)]
        except (ValueError, KeyError, TypeError) as error:
            # Not as if there were none: what it names would be deleted as leftovers.
            raise StoreError(
                f"{self.address}/{KEPT}: cannot be read ({error}); run with the release of seqmill that wrote it, or delete "
                f"{self.address} to start over"
            ) from error

    # To keep

    def put(self, folder: Path, step: int, files: Files, advance: Advance) -> None:
        """Send those of a checkpoint's files that lie in ``folder``; what ``advance`` raises breaks it off."""

        def send(name: str) -> None:
            advance(0)  # else one that is broken off still begins every file
            self.bucket.upload(folder / name, self._place(step, name, files[name]["digest"]), advance)

        _at_once(NUM_PARTS, send, [name for name in files if (folder / name).is_file()])

    def keep(self, manifest: dict[str, Any], metrics: bytes, go_on: Callable[[], None] = lambda: None) -> None:
        """Make a checkpoint exist whose parts have been put, and let the oldest go. Raises StoreError unless all are there.

        What ``go_on`` raises, asked before it exists, keeps it from that.
        """
        step = manifest["facts"]["step"]
        new = Kept(manifest, {"num_bytes": len(metrics), "digest": digest_bytes(metrics)})
        self.bucket.put(self._place(step, METRICS, new.metrics["digest"]), metrics)
        self._confirm(new)
        before = self._current()
        kept = [new, *(one for one in before if one.step != step)]
        kept = sorted(kept, key=lambda one: one.step, reverse=True)[:NUM_KEPT]
        go_on()
        self._write(kept)
        self._delete_but(kept, {name for one in before for name in one.objects()})

    def clear(self, tried: set[str]) -> None:
        """Delete objects of checkpoints that did not come to be."""
        if tried:
            self._delete_but(self._current(), tried)

    def begin(self, step: int) -> None:
        """Forget what is newer than the checkpoint of ``step`` (0: all), which is about to be trained again; remove leftovers."""
        before = self._current()
        kept = [one for one in before if one.step <= step]
        if len(kept) < len(before):
            self._write(kept)
        self._delete_but(kept, {name.removeprefix(f"{self.folder}/") for name in _listed(self.bucket, self.folder)})

    def drop(self, step: int) -> None:
        """Forget a checkpoint that is damaged. Raises StoreError where it is the only one: all training would be lost."""
        kept = [one for one in self._current() if one.step != step]
        if not kept:
            raise StoreError(f"{self.address}: checkpoint-{step} is damaged, and there is no other; delete it to start over")
        self._write(kept)

    def sign(self, text: str) -> None:
        """Leave a sign, by which another node sees that it is given the same bucket."""
        self.bucket.put(f"{self.folder}/{SIGN}", text.encode())

    def has_sign(self, text: str) -> bool:
        return self.bucket.get(f"{self.folder}/{SIGN}") == text.encode()

    def _current(self) -> list[Kept]:
        """What is kept now. Raises StoreError where another process has changed it."""
        known = self._known
        kept = self.kept()
        if known and not self._known <= known:
            self._known = known  # it stays so: this process keeps nothing more
            raise StoreError(f"{self.address}: another run keeps this training's checkpoints by now; end one of the two")
        return kept

    def _write(self, kept: Sequence[Kept]) -> None:
        data = orjson.dumps([asdict(one) for one in kept])
        self._known |= {data}  # a try whose answer was cut off may have put it
        self.bucket.put(f"{self.folder}/{KEPT}", data)
        self._known = {data}

    def _confirm(self, new: Kept) -> None:
        """By asking for every part's size: another node may have put its own into another bucket."""

        def missing(name: str) -> str | None:
            entry = new.files[name]
            size = self.bucket.num_bytes(self._place(new.step, name, entry["digest"]))
            return None if size == entry["num_bytes"] else name

        if lost := next(filter(None, _at_once(NUM_REQUESTS, missing, list(new.files))), None):
            raise StoreError(f"{self.address}/checkpoint-{new.step}: {lost} is not there; give all nodes the same SEQMILL_STORE")

    def _delete_but(self, kept: Iterable[Kept], names: set[str]) -> None:
        """Delete what no manifest names any more. What cannot be deleted now is when the training begins again."""
        needed = {name for one in kept for name in one.objects()} | {KEPT, SIGN}
        try:
            _at_once(NUM_REQUESTS, lambda name: self.bucket.delete(f"{self.folder}/{name}"), sorted(names - needed))
        except StoreError as error:
            log.warning("%s; what is left of older checkpoints is deleted later", error)

    # To go on from

    def fetch(self, kept: Kept, names: Sequence[str], folder: Path, advance: Advance) -> str | None:
        """Bring files of a checkpoint here, but for those that are, then its manifest.

        Returns what is wrong with one of them in the bucket. Raises StoreError where the bucket does not answer, or where this
        disk cannot be written; what ``advance`` raises breaks it off.
        """
        try:
            return self._fetch(kept, names, folder, advance)
        except OSError as error:
            raise StoreError(
                f"{error.filename or folder}: {error.strerror or error}; make room there, or name another cache in "
                "SEQMILL_CACHE, and run again to go on"
            ) from error

    def _fetch(self, kept: Kept, names: Sequence[str], folder: Path, advance: Advance) -> str | None:
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / MANIFEST_NAME
        spelled = orjson.dumps(kept.manifest)
        if manifest.is_file() and manifest.read_bytes() != spelled:
            manifest.unlink()  # of another try at this step
        for name, entry in kept.files.items():  # as is what it left of files that are not fetched: all that is here is read
            if name not in names and (folder / name).is_file() and file_problem(folder / name, dict(entry)):
                (folder / name).unlink()

        def bring(name: str) -> str | None:
            entry = kept.files[name]
            if file_problem(folder / name, dict(entry)) is None:
                advance(entry["num_bytes"])
                return None
            # Twice, for what came over the line wrong may come right; a bucket's own damage does not.
            return self._bring(kept, name, folder, advance) and self._bring(kept, name, folder, advance)

        problem = next(filter(None, _at_once(NUM_PARTS, bring, names)), None)
        if problem is None:
            for left in folder.glob(f".*{FETCHED}*"):  # of what other ranks would have read, before it was cut off
                left.unlink()
            write_atomically(manifest, spelled)
            fsync_path(folder)
        return problem

    def headers(self, kept: Kept, names: Sequence[str]) -> list[dict[str, Any]]:
        """What safetensors files of a checkpoint hold, by their own words, which no digest vouches for.

        Raises ValueError for what is no such file, StoreError where the bucket does not answer.
        """

        def header(name: str) -> dict[str, Any]:
            entry = kept.files[name]
            place, most = self._place(kept.step, name, entry["digest"]), entry["num_bytes"] - LENGTH_BYTES
            length = int.from_bytes(self.bucket.read(place, 0, LENGTH_BYTES) or b"", "little")
            if not 0 < length <= min(most, MOST_HEADER_BYTES):
                raise ValueError(f"{name}: a header of {length} bytes")
            found = orjson.loads(bytes(self.bucket.read(place, LENGTH_BYTES, length) or b""))
            if not isinstance(found, dict):
                raise ValueError(f"{name}: no header")
            return found

        return _at_once(NUM_REQUESTS, header, names)

    def reread(self, step: int, name: str, folder: Path) -> str | None:
        """What is wrong with a part in the bucket, which another node says; None where this one reads it right.

        Nothing is left of it in ``folder``.
        """
        kept = next((one for one in self._current() if one.step == step and name in one.files), None)
        if kept is None:
            return f"{name} is in no checkpoint"
        with tempfile.TemporaryDirectory(prefix=".reread-", dir=folder) as scratch:
            return self._bring(kept, name, Path(scratch), lambda amount: None)

    def _bring(self, kept: Kept, name: str, folder: Path, advance: Advance) -> str | None:
        entry, partial = kept.files[name], folder / f".{name}{FETCHED}"
        found = self.bucket.download(self._place(kept.step, name, entry["digest"]), partial, entry["num_bytes"], advance)
        ranges = partial.with_name(f"{partial.name}.ranges")
        if found == entry["digest"]:
            fsync_path(partial)
            partial.rename(folder / name)
            ranges.unlink(missing_ok=True)
            return None
        for left in (partial, ranges):
            left.unlink(missing_ok=True)
        what = "is missing or shorter than" if found is None else "has another digest than"
        return f"{name} {what} its manifest says"

    def metrics(self, kept: Kept) -> bytes | None:
        """The reports up to a checkpoint's step; None where they are not what was put."""
        data = self.bucket.get(self._place(kept.step, METRICS, kept.metrics["digest"]))
        return data if data is not None and digest_bytes(data) == kept.metrics["digest"] else None

    def _place(self, step: int, name: str, digest: str) -> str:
        return f"{self.folder}/{_name(step, name, digest)}"


def remote_of(work: Work) -> RemoteCheckpoints | None:
    """The bucket's place for the checkpoints of what is built; None where they lie in a folder alone."""
    if isinstance(work.store, SharedStore) and work.machine.training.checkpoints is None:
        return RemoteCheckpoints(work.store, work.folder.parent.name, work.folder.name)
    return None


def remote_at(store: object, kind: object, key: object) -> RemoteCheckpoints:
    """The place that the node that leads tells of. Raises ValueError where there can be none."""
    is_plain = isinstance(kind, str) and KIND.fullmatch(kind) and isinstance(key, str) and DIGEST.fullmatch(key)
    if not (isinstance(store, SharedStore) and is_plain):
        raise ValueError(f"{kind}/{key}")
    return RemoteCheckpoints(store, str(kind), str(key))


def sweep_remote(store: SharedStore) -> None:
    """Delete the checkpoints of what is in the store by now, as far as a listing knows them."""
    try:
        for kind in filter(KIND.fullmatch, store.bucket.names(FOLDER)):
            for key in filter(DIGEST.fullmatch, store.bucket.names(f"{FOLDER}/{kind}")):
                if store.load(kind, Digest(key)):
                    forget(store, kind, key)
    except StoreError as error:
        log.warning("%s; checkpoints of what is built are deleted later", error)


def forget(store: SharedStore, kind: str, key: str) -> None:
    """Delete all checkpoints of an artifact that is built."""
    folder = f"{FOLDER}/{kind}/{key}"
    store.bucket.delete(f"{folder}/{KEPT}")  # first: a deletion cut short must not leave what looks whole
    _at_once(NUM_REQUESTS, store.bucket.delete, _listed(store.bucket, folder))
    log.info("%s/%s: the artifact is built; its checkpoints are deleted", store.address, folder)


def _listed(bucket: Bucket, folder: str) -> list[str]:
    return [one.name for one in bucket.objects(folder)]


def part_objects(step: int, files: Files) -> set[str]:
    """The names, below the training's folder, of a checkpoint's files."""
    return {_name(step, name, entry["digest"]) for name, entry in files.items()}


def _checked_metrics(entry: Mapping[str, Any]) -> dict[str, Any]:
    if not DIGEST.fullmatch(entry["digest"]):
        raise ValueError(f"{entry['digest']!r} is no digest")
    return dict(entry)


def _name(step: int, name: str, digest: str) -> str:
    return f"checkpoint-{step}/{digest}/{name}"


def _at_once(number: int, function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """What ``function`` returns for every item; the first error is raised once all have ended."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(number, thread_name_prefix="checkpoints") as pool:
        return list(pool.map(function, items))
