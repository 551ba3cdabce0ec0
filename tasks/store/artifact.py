"""What the store holds: an artifact and its manifest."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tasks.errors import StoreError
from tasks.store.digest import Digest, digest_json

MANIFEST_NAME = "manifest.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Frozen):
    """One file of an artifact; ``name`` is its path inside the artifact, with slashes."""

    name: str
    num_bytes: int
    digest: Digest


class ShardEntry(_Frozen):
    """A shard listed by an artifact: ``name`` is ``<split>/<number>``, ``content`` decides, ``kind`` and ``key`` locate."""

    name: str
    kind: str
    key: Digest
    content: Digest
    num_bytes: int
    stats: dict[str, Any] = {}

    @property
    def split(self) -> str:
        """ "train" or "validation"."""
        return self.name.split("/")[0]


class Manifest(_Frozen):
    """The commit of an artifact: an artifact without it does not exist.

    ``identity`` is {kind, revision, spec, inputs} and decides ``key``; ``files`` and ``shards`` decide ``content``;
    ``stats`` and ``produced_by`` are told, never digested.
    """

    kind: str
    key: Digest
    content: Digest
    identity: dict[str, Any]
    files: tuple[FileEntry, ...]
    shards: tuple[ShardEntry, ...] = ()
    stats: dict[str, Any] = {}
    created: str
    produced_by: dict[str, Any] = {}


def content_of(files: tuple[FileEntry, ...], shards: tuple[ShardEntry, ...]) -> Digest:
    """The digest of an artifact's file list, and of the shards it lists by content."""
    return digest_json(
        {
            "files": [[entry.name, entry.num_bytes, entry.digest] for entry in sorted(files, key=lambda entry: entry.name)],
            "shards": [[entry.name, entry.content] for entry in shards],
        }
    )


@dataclass(frozen=True)
class Artifact:
    """A finished, immutable artifact in the store; ``found`` says that this run did not build it."""

    root: Path
    manifest: Manifest
    found: bool

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def key(self) -> Digest:
        return self.manifest.key

    @property
    def content(self) -> Digest:
        return self.manifest.content

    @property
    def stats(self) -> dict[str, Any]:
        return self.manifest.stats

    @property
    def spec(self) -> dict[str, Any]:
        return dict(self.manifest.identity["spec"])

    @property
    def folder(self) -> Path:
        """Where the artifact's files lie, or will once they are fetched."""
        return self.root / self.kind / self.key

    @property
    def path(self) -> Path:
        """The artifact's folder, with every file in it."""
        return self.folder

    @property
    def ref(self) -> str:
        """``kind/key``, as every command takes it."""
        return f"{self.kind}/{self.key}"

    @property
    def short(self) -> str:
        """The reference as a line has room for it; every command takes it so, too."""
        return f"{self.kind}/{self.key[:12]}"

    @property
    def num_bytes(self) -> int:
        """Bytes of its own files and of the shards it lists."""
        files = sum(entry.num_bytes for entry in self.manifest.files)
        return files + sum(entry.num_bytes for entry in self.manifest.shards)

    def file(self, name: str) -> Path:
        """The path of one of its files. Raises StoreError where the artifact has no such file."""
        return self.folder / self.entry(name).name

    def read(self, name: str, start: int, num_bytes: int) -> bytes:
        """So many bytes of one of its files, fewer where it ends before; of a shared store, without fetching the file."""
        with self.file(name).open("rb") as file:
            file.seek(start)
            return file.read(num_bytes)

    def entry(self, name: str) -> FileEntry:
        """One of its files as the manifest has it. Raises StoreError where the artifact has no such file."""
        for entry in self.manifest.files:
            if entry.name == name:
                return entry
        raise StoreError(
            f"{self.short}: no file {name} in its manifest; it has {', '.join(entry.name for entry in self.manifest.files)}"
        )

    def has_file(self, name: str) -> bool:
        return any(entry.name == name for entry in self.manifest.files)

    def shards(self, split: str | None = None) -> Iterator[ShardEntry]:
        """The shards it lists, in order; of one split where named."""
        return (entry for entry in self.manifest.shards if split is None or entry.split == split)

    def shard_file(self, entry: ShardEntry, name: str) -> Path:
        """The path of a file of a shard that this artifact lists."""
        return self.root / entry.kind / entry.key / name
