"""Why an artifact is built: in which fields it differs from the nearest one in the store, followed upstream to the cause."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.store.records import Record, Records

# Inputs that differ for one reason upstream would tell it over and over; a line is read, a screen is not.
MOST_CAUSES = 4


@dataclass(frozen=True)
class Reason:
    """What makes an artifact another than ``nearest``: a line each, and all in one. ``nearest`` None: there is none like it.

    causes: the same as it is told of what is made from the artifact: no input's digests, but what first changed upstream.
    """

    changes: tuple[str, ...]
    causes: tuple[str, ...]
    nearest: Record | None = None

    @property
    def text(self) -> str:
        return "; ".join(self.changes)

    def told(self) -> dict[str, Any]:
        """What the manifest keeps of it."""
        return {"reason": self.text, "nearest": self.nearest.ref if self.nearest else None}


def reason_for(
    identity: Mapping[str, Any], inputs: Mapping[str, Record], records: Records, *, recipe: str | None = None, url: Any = None
) -> Reason:
    """Why the artifact of ``identity``, made from ``inputs``, is not in the store.

    recipe: of artifacts equally near, one that this recipe made is nearer. url: archives of one address are versions of
    each other, others have nothing to do with each other.
    """
    kinds = {name: record.kind for name, record in inputs.items()}
    nearest = nearest_to(identity, kinds, records, recipe=recipe, url=url)
    if nearest is None:
        nothing = (absent(identity, records),)
        return Reason(nothing, nothing)
    changes = own_changes(nearest, identity)
    causes = [of_kind(nearest.kind, change) for change in changes]
    for line, because in input_changes(nearest, identity, inputs, records):
        changes.append(f"{line} because {listed(because)}" if because else line)
        causes += because or [of_kind(nearest.kind, line)]
    unreadable = ("its manifest cannot be read",)
    return Reason(tuple(changes) or unreadable, tuple(dict.fromkeys(causes)) or unreadable, nearest)


def own_changes(nearest: Record, identity: Mapping[str, Any]) -> list[str]:
    """The fields that differ, but for inputs that are artifacts."""
    return [line for line in differences(nearest.identity, identity) if name_of(line) in ("", "source")]


def absent(identity: Mapping[str, Any], records: Records) -> str:
    """Said where nothing like it is in the store."""
    kind, source = identity["kind"], identity["inputs"].get("source")
    return f"the store has no bytes of {short(source)}" if source and records.of_kind(kind) else f"no {kind} in the store"


def nearest_to(
    identity: Mapping[str, Any],
    kinds: Mapping[str, str],
    records: Records,
    *,
    recipe: str | None = None,
    url: Any = None,
    unknown: frozenset[str] = frozenset(),
) -> Record | None:
    """The artifact of the kind that differs in the fewest fields; of those equally near, the recipe's own, then the newest.

    kinds: each input's kind, for an evaluation of another sort of model is no neighbor. unknown: inputs that count for nothing.
    """
    candidates = records.of_kind(identity["kind"])
    if url is not None:
        candidates = [record for record in candidates if record.produced_by.get("unkeyed", {}).get("url") == url]

    def distance(record: Record) -> tuple[int, bool]:
        given = record.produced_by.get("inputs", {})
        others = sum(given.get(name, "").partition("/")[0] not in ("", kind) for name, kind in kinds.items())
        changed = sum(name_of(line) not in unknown for line in differences(record.identity, identity))
        return changed + 10 * others, record.produced_by.get("recipe") != recipe

    return min(reversed(candidates), key=distance, default=None)


def name_of(change: str) -> str:
    """The input that a line of differences is about; "" where it is about none."""
    path = change.split(" ", 1)[0]
    return path.removeprefix("inputs.") if path.startswith("inputs.") else ""


def input_changes(
    nearest: Record, identity: Mapping[str, Any], inputs: Mapping[str, Record], records: Records
) -> Iterator[tuple[str, list[str]]]:
    """The inputs that differ, a line each, each with what changed upstream, as far as the store still knows."""
    for line in differences({"inputs": nearest.identity["inputs"]}, {"inputs": identity["inputs"]}):
        name = name_of(line)
        if name == "source":
            continue
        before, after = records.input_of(nearest, name), inputs.get(name)
        yield line, list(dict.fromkeys(upstream_causes(before, after, records))) if before and after else []


def upstream_causes(before: Record, after: Record, records: Records) -> Iterator[str]:
    """What first made ``after`` another than ``before``: fields of theirs, or of what they were made from."""
    if before.content == after.content:
        return
    own = own_changes(before, after.identity)
    upstream = False
    for name in after.inputs:
        if before.inputs.get(name) == after.inputs[name]:
            continue
        upstream = True
        first, second = records.input_of(before, name), records.input_of(after, name)
        if first and second:
            yield from upstream_causes(first, second, records)
        else:
            yield f"{after.kind} has another {name}"
    yield from (of_kind(after.kind, line) for line in own)
    if not own and not upstream:
        yield f"{after.kind} of the same identity came out with other bytes"


def of_kind(kind: str, change: str) -> str:
    """A change of one stage's identity, told from another's: ``documents.min_characters 2 -> 5``."""
    return f"{kind}.{change.removeprefix('spec.').removeprefix('inputs.')}"


def differences(before: Mapping[str, Any], after: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """The fields in which two identities differ, one line each: ``spec.block_size 2048 -> 1024``."""
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        path = f"{where}{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{path}.")
        elif old != new:
            yield f"{path} {short(old)} -> {short(new)}"


def listed(lines: list[str]) -> str:
    """Several in one line, the first of them where they are many."""
    more = len(lines) - MOST_CAUSES
    return ", ".join(lines[:MOST_CAUSES]) + (f" and {more} more" if more > 0 else "")


def short(value: Any) -> str:
    """A value as a line has room for it."""
    text = "absent" if value is None else str(value)
    return text if len(text) <= 20 else f"{text[:12]}…"
