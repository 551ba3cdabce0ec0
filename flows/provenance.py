"""An artifact's provenance as an in-toto statement of the SLSA form: what was built, from what, by what, when.

https://in-toto.io/Statement/v1 with the predicate https://slsa.dev/provenance/v1. A statement, not an attestation: who signs
it puts it into an envelope (DSSE) of their own.
"""

from collections.abc import Iterator
from typing import Any

from tasks.store import Artifact, ArtifactStore
from tasks.store.records import Record, Records, record_of

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:seqmill:stage:v1"


def provenance(store: ArtifactStore, artifact: Artifact) -> dict[str, Any]:
    """The statement of one artifact; its shards' files are among its subjects."""
    store.learn()
    record = record_of(artifact.manifest)
    return {
        "_type": STATEMENT,
        "subject": list(_subjects(store, artifact)),
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": _definition(record, Records(store.root)),
            "runDetails": _details(record),
        },
    }


def _subjects(store: ArtifactStore, artifact: Artifact) -> Iterator[dict[str, Any]]:
    for file in artifact.manifest.files:
        yield {"name": file.name, "digest": {"sha256": file.digest}}
    entries = list(artifact.shards())
    for entry, shard in zip(entries, store.listed(entries), strict=True):
        if shard is None:  # the shard's own digest is that of its list of files
            yield {"name": entry.name, "digest": {"seqmillContent": entry.content}}
            continue
        for file in shard.manifest.files:
            yield {"name": f"{entry.name}/{file.name}", "digest": {"sha256": file.digest}}


def _definition(record: Record, records: Records) -> dict[str, Any]:
    told = record.produced_by
    return {
        "buildType": BUILD_TYPE,
        "externalParameters": {"kind": record.kind, "revision": record.identity["revision"], "spec": record.identity["spec"]},
        "internalParameters": {"key": record.key, "recipe": told.get("recipe"), "unkeyed": told.get("unkeyed", {})},
        "resolvedDependencies": [*_inputs(record, records), *_source(record), *_code(told)],
    }


def _inputs(record: Record, records: Records) -> Iterator[dict[str, Any]]:
    for name, content in record.inputs.items():
        found = records.input_of(record, name)
        ref = found.ref if found else told_ref(record, name)
        yield {"name": name, "uri": f"seqmill:{ref}", "digest": {"seqmillContent": content}}


def told_ref(record: Record, name: str) -> str:
    return str(record.produced_by.get("inputs", {}).get(name, name))


def _source(record: Record) -> Iterator[dict[str, Any]]:
    """The bytes from outside: by their digest where it is known, else by what their server calls them."""
    source = record.identity["inputs"].get("source")
    if source is None:
        return
    unkeyed = record.produced_by.get("unkeyed", {})
    where = next((str(unkeyed[name]) for name in ("url", "weights", "source") if unkeyed.get(name)), "unknown")
    digests = {name: record.stats[name] for name in ("sha256", "md5") if isinstance(record.stats.get(name), str)}
    yield {"name": "source", "uri": where, **({"digest": digests} if digests else {}), "annotations": {"validator": source}}


def _code(told: Any) -> Iterator[dict[str, Any]]:
    if told.get("commit"):
        yield {
            "name": "seqmill",
            "uri": "git+seqmill",
            "digest": {"gitCommit": told["commit"]},
            "annotations": {"isDirty": told.get("is_dirty")},
        }
    for name, version in (told.get("packages") or {}).items():
        yield {"name": name, "uri": f"pkg:pypi/{name}@{version}"}


def _details(record: Record) -> dict[str, Any]:
    told = record.produced_by
    started = {"startedOn": told["started"]} if told.get("started") else {}
    byproducts = [{"name": "reason", "uri": f"seqmill:{record.ref}#reason", "annotations": {"reason": told.get("reason")}}]
    return {
        "builder": {"id": f"urn:seqmill:host:{told.get('host')}", "version": {"python": str(told.get("python"))}},
        "metadata": {"invocationId": record.ref, **started, "finishedOn": record.created},
        "byproducts": byproducts if told.get("reason") else [],
    }
