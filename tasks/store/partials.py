"""What writes that were killed left in a bucket which is a folder: no listing has it, since its names are not those of objects.

Reads and deletes  <folder>/.../<name>#<number>
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tasks.store.bucket import Bucket, Listed
from tasks.store.claim import CLAIMS
from tasks.store.fate import DAMAGED, FATES, TRASH
from tasks.store.layout import DIGEST
from tasks.store.pins import PINS, RUNS
from tasks.store.store import KIND
from tasks.store.uses import LEASES

CHECKPOINTS = ".checkpoints"
OWN = (PINS, RUNS, LEASES, CLAIMS, TRASH, FATES, DAMAGED, CHECKPOINTS)
PARTIAL = re.compile(r".*#\d+")  # as object_store's LocalFileSystem names what it has not yet renamed


def partials(bucket: Bucket) -> Iterator[Listed]:
    """Files that were begun, in the store's own folders, each with its path as its name; none where the bucket is no folder."""
    parts = urlsplit(bucket.url)
    if parts.scheme != "file":
        return
    for top in _folders(unquote(parts.path)):
        if top.name in OWN:
            yield from _below(top.path)
        elif KIND.fullmatch(top.name):
            for key in _folders(top.path):
                if DIGEST.fullmatch(key.name):
                    yield from _below(key.path)


def remove(partial: Listed) -> None:
    """Delete one, if it is there."""
    Path(partial.name).unlink(missing_ok=True)


def _folders(folder: str) -> Iterator["os.DirEntry[str]"]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        yield from (entry for entry in entries if entry.is_dir(follow_symlinks=False))


def _below(folder: str) -> Iterator[Listed]:
    for base, _, names in os.walk(folder):
        for name in filter(PARTIAL.fullmatch, names):
            path = os.path.join(base, name)
            with contextlib.suppress(FileNotFoundError):  # written to its end meanwhile
                found = os.stat(path)
                yield Listed(path, found.st_size, found.st_mtime)
