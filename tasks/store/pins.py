"""Pins and records of runs: what `seqmill gc` starts from.

Writes  <root>/.pins/<kind>-<key>.json             an artifact that is kept, with all that it was made from, until it is unpinned
        <root>/.runs/<time>-<recipe>-<pid>.json    a run of a recipe: the artifacts that it found or built, node by node
"""

import contextlib
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from tasks.store.artifact import Artifact
from tasks.store.digest import write_atomically

log = logging.getLogger(__name__)

PINS, RUNS = ".pins", ".runs"


def pin(artifact: Artifact, note: str | None = None) -> None:
    """Keep an artifact, with all that it was made from, from being collected; ``note`` says why, or what it was released as."""
    value = {"ref": artifact.ref, "note": note, "pinned": _now()}
    write_atomically(_pin_path(artifact), orjson.dumps(value))


def unpin(artifact: Artifact) -> bool:
    """Take the pin off; False where there was none."""
    path = _pin_path(artifact)
    was_pinned = path.exists()
    path.unlink(missing_ok=True)
    return was_pinned


def pins(root: Path) -> list[dict[str, Any]]:
    """Every pin: {"ref", "note", "pinned"}, oldest first."""
    return sorted(_read_all(root / PINS), key=lambda pinned: (pinned.get("pinned", ""), pinned.get("ref", "")))


def runs(root: Path) -> list[dict[str, Any]]:
    """Every recorded run, oldest first: {"recipe", "until", "state", "started", "ended", "refs": {node: ref}, ...}."""
    return sorted(_read_all(root / RUNS), key=lambda run: (run.get("started", ""), run.get("pid", 0)))


@contextmanager
def recorded_run(
    root: Path, recipe: str, until: list[str], overrides: Mapping[str, Any] | None
) -> Iterator[Callable[[str, str], None]]:
    """Records a run, and as it goes each node's artifact: call what is yielded with the node's name and the reference.

    A run that is killed stays recorded as "running", with what it had come to.
    """
    started = datetime.now(UTC)
    path = root / RUNS / f"{started:%Y%m%dT%H%M%S.%f}-{recipe}-{os.getpid()}.json"
    run: dict[str, Any] = {
        "recipe": recipe, "until": until, "overrides": dict(overrides or {}), "host": platform.node(), "pid": os.getpid(),
        "state": "running", "started": started.isoformat(timespec="microseconds"), "ended": None, "refs": {},
    }  # fmt: skip

    def write(**changes: Any) -> None:
        run.update(changes)
        with contextlib.suppress(OSError):  # a store that cannot be written is not collected either
            write_atomically(path, orjson.dumps(run, default=str))

    write()
    try:
        yield lambda name, ref: write(refs={**run["refs"], name: ref})
    except BaseException as error:
        write(state="failed", ended=_now(), error=f"{type(error).__name__}: {error}"[:1000])
        raise
    write(state="finished", ended=_now())


def last_refs(root: Path, keep_last: int) -> set[str]:
    """Of every node of every recipe, the last ``keep_last`` different artifacts that runs found or built.

    Different ones: a nightly run that finds all as it was must not push out what was there before the last change.
    """
    kept: dict[tuple[str, str], dict[str, None]] = {}
    for run in reversed(runs(root)):
        for name, ref in run.get("refs", {}).items():
            refs = kept.setdefault((run.get("recipe", ""), name), {})
            if len(refs) < keep_last:
                refs[ref] = None
    return {ref for refs in kept.values() for ref in refs}


def _pin_path(artifact: Artifact) -> Path:
    return artifact.root / PINS / f"{artifact.kind}-{artifact.key}.json"


def _read_all(folder: Path) -> Iterator[dict[str, Any]]:
    for path in folder.glob("[!.]*.json"):
        try:
            value = orjson.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            log.warning("%s: cannot be read (%s); passed over", path, type(error).__name__)
            continue
        if isinstance(value, dict):
            yield value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
