"""Where an artifact comes from: the tree of what it was made from, back to the archives, with who built each, when and why."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.store import Artifact, ArtifactStore
from tasks.store.reason import reason_for
from tasks.store.records import Record, Records, record_of


@dataclass(frozen=True)
class Line:
    """One artifact of a tree: ``name`` is what it is to the one above it. record None: the store no longer has it."""

    name: str
    ref: str
    content: str | None
    record: Record | None
    inputs: tuple["Line", ...] = ()
    is_above: bool = False  # told in full further up

    def row(self) -> dict[str, Any]:
        """The tree as `seqmill lineage --json` prints it."""
        told = origin(self.record) if self.record and not self.is_above else {}
        here = {"name": self.name, "ref": self.ref, "content": self.content, "in_store": self.record is not None, **told}
        return here if self.is_above else {**here, "inputs": [line.row() for line in self.inputs]}

    def lines(self, depth: int = 0) -> Iterator[str]:
        """The tree as a person reads it."""
        parts = [f"{self.name}: {shortened(self.ref)}", f"content {(self.content or '?')[:12]}"]
        if self.is_above:
            parts = [parts[0], "(above)"]
        elif self.record is None:
            parts.append("no longer in the store")
        else:
            parts += told_by(self.record)
        yield "  " * depth + ", ".join(parts)
        for line in self.inputs:
            yield from line.lines(depth + 1)


def lineage(store: ArtifactStore, artifact: Artifact) -> Line:
    """The tree of an artifact."""
    store.learn()
    return _line("", record_of(artifact.manifest), Records(store.root), set())


def _line(name: str, record: Record, records: Records, seen: set[str]) -> Line:
    if record.ref in seen:
        return Line(name, record.ref, record.content, record, is_above=True)
    seen.add(record.ref)
    inputs = []
    for given, content in record.inputs.items():
        found = records.input_of(record, given)
        named = record.produced_by.get("inputs", {}).get(given, given)
        inputs.append(_line(given, found, records, seen) if found else Line(given, named, content, None))
    return Line(name or record.kind, record.ref, record.content, record, tuple(inputs))


def origin(record: Record) -> dict[str, Any]:
    """What a manifest tells of how its artifact came about; None for what it does not tell."""
    told = record.produced_by
    names = ("recipe", "commit", "is_dirty", "host", "python", "packages", "seconds", "reason", "nearest", "unkeyed")
    return {
        "revision": record.identity.get("revision"),
        "source": record.identity.get("inputs", {}).get("source"),
        "created": record.created,
        "num_bytes": record.num_bytes,
        "num_shards": record.num_shards,
        **{name: told.get(name) for name in names},
    }


def told_by(record: Record) -> list[str]:
    """The same in a line: when, by which recipe and code, where; a source with its address."""
    told = origin(record)
    parts = [f"built {record.created}"]
    if told["recipe"]:
        parts.append(f"recipe {told['recipe']}")
    parts.append(f"seqmill {(told['packages'] or {}).get('seqmill', '?')} {commit(told)}".strip())
    parts.append(f"host {told['host']}")
    if told["source"]:
        where = next((str(value) for name, value in (told["unkeyed"] or {}).items() if name in ("url", "weights", "source")), "")
        parts.append(f"source {str(told['source'])[:19]} {where}".strip())
    return parts


def commit(told: Mapping[str, Any]) -> str:
    """The project's commit, and whether files differed from it; nothing where it was no checkout."""
    return f"at {told['commit'][:12]}{' (changed)' if told.get('is_dirty') else ''}" if told.get("commit") else ""


def explain(store: ArtifactStore, artifact: Artifact) -> dict[str, Any]:
    """Why an artifact was built when it was, as its manifest tells; of one that does not tell, from what the store has now."""
    record = record_of(artifact.manifest)
    stored = record.produced_by.get("reason")
    told = {"reason": stored, "nearest": record.produced_by.get("nearest")} if stored else _reason_now(store, record)
    return {
        "ref": record.ref,
        "is_stored": stored is not None,
        **told,
        **{k: v for k, v in origin(record).items() if k not in told},
    }


def _reason_now(store: ArtifactStore, record: Record) -> dict[str, Any]:
    if record.kind.endswith("-shard"):
        return {"reason": "a shard is built where an artifact that lists it is", "nearest": None}
    store.learn()
    records = Earlier(store, record)
    found = {name: given for name in record.inputs if (given := records.input_of(record, name))}
    url = record.produced_by.get("unkeyed", {}).get("url")
    return reason_for(record.identity, found, records, recipe=record.produced_by.get("recipe"), url=url).told()


class Earlier(Records):
    """The records of a store as it was before one of them was built."""

    def __init__(self, store: ArtifactStore, record: Record) -> None:
        super().__init__(store.root)
        self.record = record

    def of_kind(self, kind: str) -> list[Record]:
        found = super().of_kind(kind)
        if kind != self.record.kind:
            return found
        return [other for other in found if other.key != self.record.key and other.created <= self.record.created]


def shortened(ref: str) -> str:
    """A reference with the first characters of its key."""
    kind, slash, key = ref.partition("/")
    return f"{kind}{slash}{key[:12]}"
