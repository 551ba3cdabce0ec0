"""The artifact store, identity, and stages."""

from tasks.store.artifact import Artifact, FileEntry, Manifest, ShardEntry
from tasks.store.bucket import is_url
from tasks.store.cache import cache_folder
from tasks.store.digest import Digest, canonical_json, digest_bytes, digest_file, digest_json, write_atomically
from tasks.store.shared import SharedStore, store_of
from tasks.store.stage import Built, Spec, Stage, Work, shard_entry, stage, unkeyed
from tasks.store.store import ArtifactStore

__all__ = [
    "Artifact", "ArtifactStore", "Built", "Digest", "FileEntry", "Manifest", "ShardEntry", "SharedStore", "Spec", "Stage",
    "Work", "cache_folder", "canonical_json", "digest_bytes", "digest_file", "digest_json", "is_url", "shard_entry", "stage",
    "store_of", "unkeyed", "write_atomically",
]  # fmt: skip
