"""Pins and records of runs: what `seqmill gc` starts from.

Writes  .pins/<kind>-<key>.json                     an artifact that is kept, with all that it was made from, until it is unpinned
        .runs/<time>-<recipe>-<host>-<pid>.json     a run of a recipe: the artifacts that it found or built, node by node
"""

import logging
import os
import platform
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import orjson

from tasks.errors import StoreError
from tasks.store.artifact import Artifact
from tasks.store.notes import Note, Notes

log = logging.getLogger(__name__)

PINS, RUNS = ".pins", ".runs"
UNFINISHED_SECONDS = 30 * 86_400.0  # a run that was not gone on with for so long will not be
# The record of a run that was not written for so long goes, unless it alone tells of one of a node's last KEPT_LAST artifacts.
RECORD_SECONDS, KEPT_LAST = UNFINISHED_SECONDS, 10


def pin(notes: Notes, artifact: Artifact, note: str | None = None) -> None:
    """Keep an artifact, with all that it was made from, from being collected; ``note`` says why, or what it was released as."""
    notes.write(_pin_name(artifact), {"ref": artifact.ref, "note": note, "pinned": _now()})


def unpin(notes: Notes, artifact: Artifact) -> bool:
    """Take the pin off; False where there was none."""
    return notes.remove(_pin_name(artifact))


def pins(notes: Notes, *, is_strict: bool = False) -> list[dict[str, Any]]:
    """Every pin: {"ref", "note", "pinned"}, oldest first.

    is_strict: raise StoreError for one that cannot be read, which is passed over otherwise.
    """
    found = [note.value for note in notes.read_all(PINS, is_strict=is_strict, is_sound=_is_pin)]
    return sorted(found, key=lambda pinned: (pinned.get("pinned", ""), pinned.get("ref", "")))


def runs(notes: Notes, *, is_strict: bool = False) -> list[dict[str, Any]]:
    """Every recorded run, oldest first: {"recipe", "until", "state", "started", "ended", "refs": {node: ref}, ...}."""
    return [note.value for note in run_notes(notes, is_strict=is_strict)]


def run_notes(notes: Notes, *, is_strict: bool = False) -> list[Note]:
    """What ``runs`` returns, as records."""
    return sorted(
        notes.read_all(RUNS, is_strict=is_strict, is_sound=_is_run),
        key=lambda note: (note.value.get("started", ""), note.value.get("pid", 0)),
    )


@contextmanager
def recorded_run(
    notes: Notes, recipe: str, until: list[str], overrides: Mapping[str, Any] | None
) -> Iterator[Callable[[str, str], None]]:
    """Records a run, and as it goes each node's artifact: call what is yielded with the node's name and the reference.

    A run that is killed stays recorded as "running", with what it had come to.
    """
    started = datetime.now(UTC)
    name = f"{RUNS}/{started:%Y%m%dT%H%M%S.%f}-{recipe}-{platform.node()}-{os.getpid()}.json"
    run: dict[str, Any] = {
        "recipe": recipe, "until": until, "overrides": dict(overrides or {}), "host": platform.node(), "pid": os.getpid(),
        "state": "running", "started": started.isoformat(timespec="microseconds"), "ended": None, "refs": {},
    }  # fmt: skip

    noting = threading.Lock()  # branches of a run end side by side

    def write(refs: Mapping[str, str] | None = None, **changes: Any) -> None:
        with noting:
            run["refs"].update(refs or {})
            run.update(changes)
            try:
                notes.write(name, run)
            except OSError:
                pass  # a store that cannot be written is not collected either
            except StoreError as error:
                log.warning("%s; the run is not recorded, and what it finds may be collected", error)

    write()
    try:
        yield lambda name, ref: write({name: ref})
    except BaseException as error:
        write(state="failed", ended=_now(), error=f"{type(error).__name__}: {error}"[:1000])
        raise
    write(state="finished", ended=_now())


def last_refs(runs: Sequence[Mapping[str, Any]], keep_last: int) -> set[str]:
    """Of every node of every recipe, the last ``keep_last`` different artifacts that these runs, oldest first, found or built.

    Different ones: a nightly run that finds all as it was must not push out what was there before the last change.
    """
    return {ref for refs in _last(runs, keep_last).values() for ref in refs}


def _last(runs: Sequence[Mapping[str, Any]], keep_last: int) -> dict[tuple[str, str], dict[str, int]]:
    """By recipe and node, those references, each with the number of the last run, of these, that names it."""
    kept: dict[tuple[str, str], dict[str, int]] = {}
    for number, run in reversed(list(enumerate(runs))):
        for name, ref in run.get("refs", {}).items():
            refs = kept.setdefault((run.get("recipe", ""), name), {})
            if len(refs) < keep_last:
                refs.setdefault(ref, number)
    return kept


def spent(recorded: Sequence[Note], now: float, keep_last: int, kept_last: int = KEPT_LAST) -> list[Note]:
    """The runs, of these, oldest first, whose records change nothing any more: neither of ``last_refs`` nor of ``unfinished``.

    now: by the clock that dates the records. None goes that was written within RECORD_SECONDS, or that a collection would need
    which keeps the last ``kept_last`` of each node; ``keep_last`` is what this one keeps.
    """
    values = [note.value for note in recorded]
    needed = {number for refs in _last(values, max(keep_last, kept_last)).values() for number in refs.values()}
    held = {id(run) for _, run in unfinished(values, now)}
    old = (number for number, note in enumerate(recorded) if note.written < now - RECORD_SECONDS)
    return [recorded[number] for number in old if number not in needed and id(values[number]) not in held]


def unfinished(runs: Sequence[Mapping[str, Any]], now: float) -> list[tuple[float, Mapping[str, Any]]]:
    """The runs, of these, that stopped on their way and may go on, each with when it began; both in seconds since 1970.

    Of each recipe, with each overrides, and each end the last run counts, and none that began longer than UNFINISHED_SECONDS ago.
    """
    last = {(run.get("recipe"), _overrides(run), tuple(run.get("until") or ())): run for run in runs}
    stopped = [run for run in last.values() if run.get("state") != "finished" and "started" in run]
    began = [(datetime.fromisoformat(run["started"]).timestamp(), run) for run in stopped]
    return [(when, run) for when, run in began if when >= now - UNFINISHED_SECONDS]


def unfinished_since(runs: Sequence[Mapping[str, Any]], now: float) -> float | None:
    """When the earliest of those began; None where there is none."""
    return min((when for when, _ in unfinished(runs, now)), default=None)


def _is_pin(value: Mapping[str, Any]) -> bool:
    return "/" in str(value.get("ref"))


def _is_run(value: Mapping[str, Any]) -> bool:
    refs, is_dated = value.get("refs", {}), isinstance(value.get("began") or 0.0, float | int)
    return is_dated and isinstance(refs, dict) and all(isinstance(ref, str) for ref in refs.values())


def _overrides(run: Mapping[str, Any]) -> bytes:
    return orjson.dumps(run.get("overrides") or {}, default=str, option=orjson.OPT_SORT_KEYS)


def _pin_name(artifact: Artifact) -> str:
    return f"{PINS}/{artifact.kind}-{artifact.key}.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
