"""Small records beside the artifacts, pins and runs: files of a local store, objects of a shared one.

Reads and writes  <root>/<folder>/<name>.json or <url>/<folder>/<name>.json
"""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import orjson

from tasks.errors import StoreError
from tasks.store.bucket import Bucket
from tasks.store.digest import write_atomically

log = logging.getLogger(__name__)

NUM_REQUESTS = 16


Sound = Callable[[dict[str, Any]], bool]  # whether a record has what its readers take


def any_dict(value: dict[str, Any]) -> bool:
    return True


class Note(NamedTuple):
    """A record as it was read. written: by the clock that dates the store, in seconds since 1970."""

    name: str
    value: dict[str, Any]
    written: float
    num_bytes: int


class Notes(Protocol):
    """Where a store keeps its records; ``name`` is <folder>/<name>.json."""

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write a record, over the one that may be there. Raises OSError or StoreError."""

    def remove(self, name: str) -> bool:
        """Remove a record; False where there was none."""

    def remove_unchanged(self, note: Note) -> bool:
        """Remove a record, unless it was written since it was read, or is gone; whether it was removed."""

    def read_all(self, folder: str, *, is_strict: bool = False, is_sound: Sound = any_dict) -> list[Note]:
        """Every record of a folder.

        is_strict: raise StoreError for one that cannot be read, or is not sound, which is passed over otherwise.
        """


class FolderNotes:
    """Records as files below a store's root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._began: dict[str, float] = {}

    def write(self, name: str, value: dict[str, Any]) -> None:
        write_atomically(self.root / name, _spelled(value, self._began.get(name)))
        if name not in self._began:
            self._began[name] = (self.root / name).stat().st_mtime

    def remove(self, name: str) -> bool:
        was_there = (self.root / name).exists()
        (self.root / name).unlink(missing_ok=True)
        return was_there

    def remove_unchanged(self, note: Note) -> bool:
        path = self.root / note.name
        try:
            if path.stat().st_mtime != note.written:
                return False
            path.unlink()
        except FileNotFoundError:
            return False
        return True

    def read_all(self, folder: str, *, is_strict: bool = False, is_sound: Sound = any_dict) -> list[Note]:
        return [note for path in self._paths(self.root / folder) if (note := self._read(path, is_strict, is_sound)) is not None]

    def _read(self, path: Path, is_strict: bool, is_sound: Sound) -> Note | None:
        try:
            with path.open("rb") as file:
                data, written = file.read(), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:  # unpinned meanwhile
            return None
        except OSError as error:
            _tell_unreadable(str(path), error, is_strict)
            return None
        value = _parsed(str(path), data, is_strict, is_sound)
        # One that tells no beginning is an earlier release's: of then its machine's clock alone is known.
        return None if value is None else Note(str(path.relative_to(self.root)), _dated(value), written, len(data))

    def _paths(self, folder: Path) -> Iterator[Path]:
        # Not by glob, to which a folder that may not be read is an empty one.
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreError(f"{folder}: cannot be read ({error.strerror}); mend its rights") from error
        yield from (folder / name for name in names if name.endswith(".json") and not name.startswith("."))


class BucketNotes:
    """Records as objects of a bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self._began: dict[str, float | None] = {}

    def write(self, name: str, value: dict[str, Any]) -> None:
        self.bucket.put(name, _spelled(value, self._began.get(name)))
        if name not in self._began:
            self._began[name] = self.bucket.modified(name)

    def remove(self, name: str) -> bool:
        was_there = self.bucket.num_bytes(name) is not None
        self.bucket.delete(name)
        return was_there

    def remove_unchanged(self, note: Note) -> bool:
        if self.bucket.modified(note.name) != note.written:
            return False
        self.bucket.delete(note.name)
        return True

    def read_all(self, folder: str, *, is_strict: bool = False, is_sound: Sound = any_dict) -> list[Note]:
        names = [listed.name for listed in self.bucket.objects(folder) if listed.name.endswith(".json")]
        with ThreadPoolExecutor(NUM_REQUESTS, thread_name_prefix="requests") as pool:
            read = list(pool.map(lambda name: self._read(name, is_strict, is_sound), names))
        return [note for note in read if note is not None]

    def _read(self, name: str, is_strict: bool, is_sound: Sound) -> Note | None:
        if (found := self.bucket.dated(name)) is None:
            return None
        value = _parsed(f"{self.bucket.url}/{name}", found[0], is_strict, is_sound)
        return None if value is None else Note(name, _dated(value, found[1]), found[1], len(found[0]))


def _spelled(value: dict[str, Any], began: float | None) -> bytes:
    return orjson.dumps({**value, "began": began} if began else value, default=str)


def _dated(value: dict[str, Any], written: float | None = None) -> dict[str, Any]:
    """A record whose run "started" by the clock that dates the store: machines' clocks differ."""
    began = value.pop("began", None) or written
    if began and "started" in value:
        value["started"] = datetime.fromtimestamp(began, UTC).isoformat(timespec="microseconds")
    return value


def _parsed(where: str, data: bytes, is_strict: bool, is_sound: Sound) -> dict[str, Any] | None:
    try:
        value = orjson.loads(data)
        if not isinstance(value, dict) or not is_sound(value):
            raise ValueError(f"{where}: not a record")
    except ValueError as error:
        _tell_unreadable(where, error, is_strict)
        return None
    return value


def _tell_unreadable(where: str, error: Exception, is_strict: bool) -> None:
    if is_strict:
        raise StoreError(
            f"{where}: cannot be read ({type(error).__name__}), and what it names would be collected; mend or delete it"
        ) from error
    log.warning("%s: cannot be read (%s); passed over", where, type(error).__name__)
