"""Pins and records of runs: what `seqmill gc` starts from.

Writes  <root>/.pins/<kind>-<key>.json             an artifact that is kept, with all that it was made from, until it is unpinned
        <root>/.runs/<time>-<recipe>-<pid>.json    a run of a recipe: the artifacts that it found or built, node by node
"""

import contextlib
import logging
import os
import platform
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from tasks.errors import StoreError
from tasks.store.artifact import Artifact
from tasks.store.digest import write_atomically

log = logging.getLogger(__name__)

PINS, RUNS = ".pins", ".runs"
UNFINISHED_SECONDS = 30 * 86_400.0  # a run that was not gone on with for so long will not be


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


def pins(root: Path, *, is_strict: bool = False) -> list[dict[str, Any]]:
    """Every pin: {"ref", "note", "pinned"}, oldest first.

    is_strict: raise StoreError for one that cannot be read, which is passed over otherwise.
    """
    return sorted(_read_all(root / PINS, is_strict), key=lambda pinned: (pinned.get("pinned", ""), pinned.get("ref", "")))


def runs(root: Path, *, is_strict: bool = False) -> list[dict[str, Any]]:
    """Every recorded run, oldest first: {"recipe", "until", "state", "started", "ended", "refs": {node: ref}, ...}."""
    return sorted(_read_all(root / RUNS, is_strict), key=lambda run: (run.get("started", ""), run.get("pid", 0)))


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

    noting = threading.Lock()  # branches of a run end side by side

    def write(refs: Mapping[str, str] | None = None, **changes: Any) -> None:
        with noting, contextlib.suppress(OSError):  # a store that cannot be written is not collected either
            run["refs"].update(refs or {})
            run.update(changes)
            write_atomically(path, orjson.dumps(run, default=str))

    write()
    try:
        yield lambda name, ref: write({name: ref})
    except BaseException as error:
        write(state="failed", ended=_now(), error=f"{type(error).__name__}: {error}"[:1000])
        raise
    write(state="finished", ended=_now())


def last_refs(root: Path, keep_last: int, *, is_strict: bool = False) -> set[str]:
    """Of every node of every recipe, the last ``keep_last`` different artifacts that runs found or built.

    Different ones: a nightly run that finds all as it was must not push out what was there before the last change.
    """
    kept: dict[tuple[str, str], dict[str, None]] = {}
    for run in reversed(runs(root, is_strict=is_strict)):
        for name, ref in run.get("refs", {}).items():
            refs = kept.setdefault((run.get("recipe", ""), name), {})
            if len(refs) < keep_last:
                refs[ref] = None
    return {ref for refs in kept.values() for ref in refs}


def unfinished_since(root: Path, now: float) -> float | None:
    """When the earliest run began that stopped on its way and may go on, in seconds since 1970; None where there is none.

    Of each recipe and each end the last run counts, and none that began longer than UNFINISHED_SECONDS ago.
    """
    last = {(run.get("recipe"), tuple(run.get("until") or ())): run for run in runs(root)}
    stopped = [run for run in last.values() if run.get("state") != "finished"]
    began = [datetime.fromisoformat(run["started"]).timestamp() for run in stopped if "started" in run]
    return min((when for when in began if when >= now - UNFINISHED_SECONDS), default=None)


def _pin_path(artifact: Artifact) -> Path:
    return artifact.root / PINS / f"{artifact.kind}-{artifact.key}.json"


def _read_all(folder: Path, is_strict: bool = False) -> Iterator[dict[str, Any]]:
    for path in _records_in(folder):
        try:
            value = orjson.loads(path.read_bytes())
        except FileNotFoundError:  # unpinned meanwhile
            continue
        except (OSError, ValueError) as error:
            if is_strict:
                raise StoreError(
                    f"{path}: cannot be read ({type(error).__name__}), and what it names would be collected; mend or delete it"
                ) from error
            log.warning("%s: cannot be read (%s); passed over", path, type(error).__name__)
            continue
        if isinstance(value, dict):
            yield value


def _records_in(folder: Path) -> list[Path]:
    # Not by glob, to which a folder that may not be read is an empty one.
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"{folder}: cannot be read ({error.strerror}); mend its rights") from error
    return [folder / name for name in names if name.endswith(".json") and not name.startswith(".")]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
