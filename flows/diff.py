"""In what two artifacts differ."""

from typing import Any

from tasks.store import Artifact, ArtifactStore
from tasks.store.reason import differences, upstream_causes
from tasks.store.records import Records, record_of


def diff(store: ArtifactStore, before: Artifact, after: Artifact) -> dict[str, Any]:
    """In what two artifacts differ: what decided them, counts, files, shards."""
    store.learn()
    first, second = record_of(before.manifest), record_of(after.manifest)
    records = Records(store.root)
    why = list(dict.fromkeys(upstream_causes(first, second, records))) if first.kind == second.kind else []
    return {
        "before": before.ref,
        "after": after.ref,
        "same_content": before.content == after.content,
        "identity": list(differences(first.identity, second.identity)),
        "because": why,
        "stats": list(differences(first.stats, second.stats)),
        "files": _files(before, after),
        "shards": _shards(before, after),
    }


def _files(before: Artifact, after: Artifact) -> list[str]:
    """The files that differ, a line each."""
    old = {entry.name: entry for entry in before.manifest.files}
    new = {entry.name: entry for entry in after.manifest.files}
    lines = []
    for name in sorted({*old, *new}):
        if name not in old:
            lines.append(f"{name} added, {new[name].num_bytes:,} bytes")
        elif name not in new:
            lines.append(f"{name} removed, {old[name].num_bytes:,} bytes")
        elif old[name].digest != new[name].digest:
            sizes = f"{old[name].num_bytes:,} -> {new[name].num_bytes:,} bytes"
            lines.append(f"{name} {old[name].digest[:12]} -> {new[name].digest[:12]}, {sizes}")
    return lines


def _shards(before: Artifact, after: Artifact) -> dict[str, Any]:
    """How many shards, of how many bytes, are in both by content, and in one alone; the names of the first of those."""
    old = {entry.content: entry for entry in before.shards()}
    new = {entry.content: entry for entry in after.shards()}
    removed = [entry for content, entry in old.items() if content not in new]
    added = [entry for content, entry in new.items() if content not in old]
    kept = [entry for content, entry in new.items() if content in old]
    return {
        "num_same": len(kept),
        "same_bytes": sum(entry.num_bytes for entry in kept),
        "num_removed": len(removed),
        "removed_bytes": sum(entry.num_bytes for entry in removed),
        "num_added": len(added),
        "added_bytes": sum(entry.num_bytes for entry in added),
        "removed": [entry.name for entry in removed],
        "added": [entry.name for entry in added],
    }
