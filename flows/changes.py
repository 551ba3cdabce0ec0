"""Whether the bytes that a recipe starts from are still those that were last seen.

Reads   what identifies every source: a file's size and times and then its digest, a server's validator and size, a hub's commit
Writes  <store>/.watch/<recipe>-<digest>.json   what was last seen of each source
"""

import fcntl
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.dag import Node
from tasks.corpus.archive import ArchiveSpec
from tasks.errors import SourceError
from tasks.machine import Machine
from tasks.store import ArtifactStore, digest_json, write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """What was last seen of one source. ``digest`` is None for published bytes that were never fetched."""

    identity: str  # what identifies the bytes without reading them all
    digest: str | None  # what they are


@dataclass(frozen=True)
class Change:
    """A source whose bytes are no longer those last seen."""

    name: str
    url: str | None
    old: str | None
    new: str | None


@dataclass(frozen=True)
class Look:
    """What one look at a recipe's sources found."""

    seen: Mapping[str, Seen]
    changes: tuple[Change, ...]
    errors: tuple[SourceError, ...]  # of sources that could not be asked; what was last seen of them still stands


def look(nodes: Iterable[Node], last: Mapping[str, Seen], store: ArtifactStore, machine: Machine) -> Look:
    """Look at every source of ``nodes``. What was never seen before is seen now, and no change."""
    seen, changes, errors = dict(last), [], []
    for node in nodes:
        try:
            now = _seen(node, last.get(node.name), store, machine)
        except SourceError as error:
            log.error("%s", error)
            errors.append(error)
            continue
        if now is None:
            continue
        before = seen.get(node.name)
        seen[node.name] = now
        if before and before.identity != now.identity and before.digest == now.digest:
            log.info("%s: touched, the bytes are as they were", node.name)
        elif before and before.identity != now.identity:
            changes.append(Change(node.name, getattr(node.spec, "url", None), before.digest, now.digest))
    return Look(seen, tuple(changes), tuple(errors))


def _seen(node: Node, before: Seen | None, store: ArtifactStore, machine: Machine) -> Seen | None:
    """What a node's source is now; None for a node that takes all from other nodes."""
    identity = node.stage.source(node.spec, store, machine)
    if identity is None:
        return None
    if before and before.identity == identity:
        return before
    if not isinstance(node.spec, ArchiveSpec) or identity.startswith(("sha256:", "md5:")):
        return Seen(identity, identity)
    # Published bytes under a server's name for them. To tell whether they are others they must be read whole, and then
    # they are in the store, where the run will find them. The first look has nothing to compare with and fetches nothing.
    key = digest_json(node.stage.identity(node.spec, {}, identity))
    artifact = node.stage(store, machine, node.spec) if before else store.find(node.kind, key)
    return Seen(identity, f"sha256:{artifact.stats['sha256']}" if artifact else None)


@contextmanager
def memory(root: Path, name: str, recipe: Path, overrides: Mapping[str, Any]) -> Iterator[Path]:
    """The file that remembers what was seen of a recipe's sources; one look at a time has it.

    Overrides, or another file whose recipe has the same name, can name other sources: theirs is another memory.
    """
    digest = digest_json({"recipe": str(recipe.absolute()), "overrides": json.dumps(overrides, sort_keys=True)})
    path = root / ".watch" / f"{name}-{digest[:12]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def last_seen(path: Path) -> dict[str, Seen]:
    """What ``remember`` wrote; nothing, where it did not or its file cannot be read."""
    try:
        return {name: Seen(**value) for name, value in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s: cannot be read (%s); every source counts as seen for the first time", path, error)
        return {}


def remember(path: Path, seen: Mapping[str, Seen]) -> None:
    """Keep what was seen for the next look."""
    write_atomically(path, json.dumps({name: asdict(value) for name, value in seen.items()}, indent=1).encode())
