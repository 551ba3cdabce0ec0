"""To send what was built to a bucket: files to a place of their own, then the right to name them.

Writes  <url>/<kind>/<key>/<place>/<file>, <url>/.store.json
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from tasks.errors import StoreError
from tasks.machine import Advance
from tasks.store.artifact import FileEntry, Manifest
from tasks.store.bucket import Bucket
from tasks.store.claim import boot_seconds
from tasks.store.fate import decide
from tasks.store.layout import file_name, moved, place_of

FORM = ".store.json"
SHOWN_BYTES = 32 << 20  # a transfer below this is over before a bar is read


class Publisher:
    """Sends files of manifests. Picklable."""

    def __init__(self, bucket: Bucket, sure_seconds: float) -> None:
        self.bucket, self.sure_seconds = bucket, sure_seconds
        self._is_checked = False

    def send(
        self,
        manifest: Manifest,
        folder: Path,
        at_once: Callable[[Callable[[FileEntry], Any], tuple[FileEntry, ...]], Any],
        bar: Callable[[str, int], AbstractContextManager[Advance]],
        *,
        is_again: bool,
    ) -> Manifest:
        """Upload a manifest's files from ``folder``; returns it as it is to be put, with another place where its own was lost.

        is_again: a try that was killed may have sent some of them, long ago, and a collector may have found them left over.
        """
        self.check()
        while True:
            begun = boot_seconds()
            at_once(partial(self._upload, manifest, folder, bar, is_again), manifest.files)
            if not is_again and boot_seconds() - begun < self.sure_seconds:
                return manifest
            place = place_of(manifest)
            # After days, what was left over is gone, and so is the word on it.
            is_ours = place is not None and decide(self.bucket, place, "kept")
            if is_ours and all(at_once(partial(self._is_there, manifest), manifest.files)):
                return manifest
            manifest, is_again = moved(manifest), False

    def _is_there(self, manifest: Manifest, entry: FileEntry) -> bool:
        return self.bucket.num_bytes(file_name(manifest, entry)) == entry.num_bytes

    def _upload(
        self,
        manifest: Manifest,
        folder: Path,
        bar: Callable[[str, int], AbstractContextManager[Advance]],
        is_again: bool,
        entry: FileEntry,
    ) -> None:
        name = file_name(manifest, entry)
        # An object appears whole, and its place is this build's alone.
        if is_again and entry.num_bytes >= SHOWN_BYTES and self.bucket.num_bytes(name) == entry.num_bytes:
            return
        with bar(f"upload {entry.name}", entry.num_bytes) as advance:
            self.bucket.upload(folder / entry.name, name, advance)

    def check(self) -> None:
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
