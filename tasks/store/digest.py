"""Digests: SHA-256 of bytes, of files, of canonical JSON."""

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path
from typing import Any, NewType

Digest = NewType("Digest", str)

READ_BYTES = 4 << 20  # one read call each 4 MB: below 1 MB the call itself shows


def digest_bytes(data: bytes) -> Digest:
    """SHA-256 of ``data`` as 64 hexadecimal characters."""
    return Digest(hashlib.sha256(data).hexdigest())


def digest_file(path: Path, advance: Callable[[int], None] | None = None) -> Digest:
    """SHA-256 of a file's bytes; ``advance`` is told the bytes of every read."""
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as source:
        while data := source.read(READ_BYTES):
            state.update(data)
            if advance:
                advance(len(data))
    return Digest(state.hexdigest())


def canonical_json(value: Any) -> bytes:
    """The one spelling of ``value`` that digests are made from.

    Keys sorted, no spaces, UTF-8. A mapping's None is a value like another: a model config's null is not its default.
    Raises TypeError for a value without a stable spelling (a set, a Path, an object, NaN).
    """
    return json.dumps(_plain(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_json(value: Any) -> Digest:
    """SHA-256 of ``canonical_json(value)``."""
    return digest_bytes(canonical_json(value))


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
    raise TypeError(
        f"{where}: {type(value).__name__} {value!r} has no stable spelling; "
        "use a finite number, a string, a list, a mapping with string keys or None"
    )


class DigestMemory:
    """Remembers the digests of large files, so that a cached run does not read 30 GB.

    A digest is remembered for a path with its size, modification time and inode; any difference reads the file again.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def digest(self, path: Path, advance: Callable[[int], None] | None = None) -> Digest:
        """SHA-256 of the file at ``path``, read only when the file is not the one remembered."""
        path = path.resolve()
        note = self.root / f"{digest_bytes(os.fsencode(path))}.json"
        state = _state(path)
        try:
            remembered = json.loads(note.read_text())
            if remembered["state"] == state:
                return Digest(remembered["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not remembered, or a note cut short: read the file
        digest = digest_file(path, advance)
        if _state(path) == state:
            self._remember(note, {"path": str(path), "state": state, "digest": digest})
        return digest

    def _remember(self, note: Path, value: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a read-only store forgets; it is only slower
            write_atomically(note, json.dumps(value).encode())


def _state(path: Path) -> list[int]:
    stat = path.stat()
    # The change time too: `cp -p` and `rsync -t` set the modification time back, nothing sets this one.
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, which appears whole, on disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # By chance, not by the process's number: two threads, or two containers on one folder, may have the same.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as target:
            target.write(data)
            target.flush()
            os.fsync(target.fileno())
        partial.rename(path)
    except BaseException:  # a full disk: nobody writes under this name again
        partial.unlink(missing_ok=True)
        raise


def write_all(target: RawIOBase, data: bytes | memoryview) -> None:
    """Write all of ``data``: one write to a disk that is nearly full takes a part of it, without an error."""
    left = memoryview(data)
    while left:
        left = left[target.write(left) or 0 :]


def fsync_tree(folder: Path) -> None:
    """Put every file and folder below ``folder`` on disk."""
    for base, _, names in os.walk(folder):
        for name in [*names, "."]:
            fsync_path(Path(base, name))


def fsync_path(path: Path) -> None:
    """Put a file, or a folder's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
