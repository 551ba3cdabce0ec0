"""The artifact store, identity, and stages."""

from tasks.store.artifact import Artifact, FileEntry, Manifest, ShardEntry
from tasks.store.digest import Digest, canonical_json, digest_bytes, digest_file, digest_json, write_atomically
from tasks.store.stage import Built, Spec, Stage, Work, shard_entry, stage, unkeyed
from tasks.store.store import ArtifactStore

__all__ = [
    "Artifact", "ArtifactStore", "Built", "Digest", "FileEntry", "Manifest", "ShardEntry", "Spec", "Stage", "Work",
    "canonical_json", "digest_bytes", "digest_file", "digest_json", "shard_entry", "stage", "unkeyed", "write_atomically",
]  # fmt: skip
