"""How far a build of documents has come, so that one that is killed goes on instead of reading the archive anew.

Writes  .scratch/journal.json  where to read on, the counts, and the shards stored so far
        .scratch/pending-<n>   the documents read that fill no shard yet

The shards, the pending documents and the quarantine are on disk before the journal names them, and a journal that cannot be
used is passed over: the build begins anew, and finds the shards that it had stored.
"""

import json
import logging
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from tasks.corpus.boundaries import Shard
from tasks.corpus.compressed import Mark
from tasks.corpus.document_shards import Shards
from tasks.corpus.judge import Ledger
from tasks.corpus.reader import Position
from tasks.store import ArtifactStore, ShardEntry
from tasks.store.digest import write_atomically

log = logging.getLogger(__name__)

FORM = 2  # of the journal; another is passed over
# A journal writes the documents that fill no shard yet, 100 MB at most: not behind every shard.
JOURNAL_SECONDS = 5.0


class Journal:
    """The journal of one build, in its scratch folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "journal.json"
        self.number = self.num_full = 0
        self.logs: dict[str, int] = {}  # scratch logs by name, and how many of their bytes count
        self.written_at = time.monotonic()

    def is_due(self, shards: Shards) -> bool:
        """Whether a shard was filled since the last journal, and that is long enough ago."""
        return shards.num_full > self.num_full and time.monotonic() - self.written_at >= JOURNAL_SECONDS

    def write(
        self, position: Position, ledger: Ledger, shards: Shards, num_quarantine_bytes: int, logs: Mapping[str, int]
    ) -> None:
        """Record that everything before ``position`` is in the ledger, the shards, the quarantine and the logs."""
        shards.settle()
        pending = self.folder / f"pending-{self.number + 1}"
        with pending.open("wb") as file:
            sizes = {split: _write_shard(file, sharder.pending) for split, sharder in shards.sharders.items()}
            file.flush()
            os.fsync(file.fileno())
        state = {
            "form": FORM,
            "number": self.number + 1,
            "position": asdict(position),
            "ledger": _ledger_state(ledger),
            "entries": {split: [entry.model_dump(mode="json") for entry in some] for split, some in shards.entries.items()},
            "pending": sizes,
            "num_quarantine_bytes": num_quarantine_bytes,
            "logs": dict(logs),
        }
        write_atomically(self.path, json.dumps(state).encode())
        (self.folder / f"pending-{self.number}").unlink(missing_ok=True)
        self.number, self.num_full, self.written_at = self.number + 1, shards.num_full, time.monotonic()

    def restore(self, store: ArtifactStore, ledger: Ledger, shards: Shards, quarantine: Path) -> tuple[Position, int]:
        """Fill an empty ledger and empty shards with what the journal says.

        Returns where to read on, and the bytes of the quarantine that count; the beginning where there is no journal to use.
        """
        if not self.path.exists():
            return Position(), 0
        try:
            state = json.loads(self.path.read_bytes())
            for path, num_bytes in ((quarantine, state["num_quarantine_bytes"]), *self._logs(state)):
                _check_size(path, num_bytes)
            entries, position = _entries(state, store), _position(state["position"])
            pending = dict(_read_pending(self.folder / f"pending-{state['number']}", state["pending"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: cannot be used (%s); the archive is read from its beginning", self.path, error)
            self.path.unlink()  # or a file that this build writes could one day pass for one that it names
            return Position(), 0
        _restore_ledger(ledger, state["ledger"])
        shards.entries.update(entries)
        for split, shard in pending.items():
            shards.sharders[split].pending = shard
        self.number, self.num_full, self.logs = state["number"], shards.num_full, state["logs"]
        log.info("goes on at line %d, with %d shards stored", position.line, self.num_full)
        return position, state["num_quarantine_bytes"]

    def _logs(self, state: dict[str, Any]) -> list[tuple[Path, int]]:
        return [(self.folder / name, num_bytes) for name, num_bytes in state["logs"].items()]


def _entries(state: dict[str, Any], store: ArtifactStore) -> dict[str, list[ShardEntry]]:
    if state["form"] != FORM:
        raise ValueError(f"its form is {state['form']}, this version writes {FORM}")
    entries = {split: [ShardEntry.model_validate(entry) for entry in some] for split, some in state["entries"].items()}
    for entry in (entry for some in entries.values() for entry in some):
        if store.find(entry.kind, entry.key) is None:
            raise ValueError(f"the store lost the shard {entry.name}")
    return entries


def _check_size(path: Path, num_bytes: int) -> None:
    if num_bytes and path.stat().st_size < num_bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, fewer than {num_bytes}")


def _position(state: dict[str, Any]) -> Position:
    return Position(state["line"], state["offset"], Mark(**state["mark"]))


def _ledger_state(ledger: Ledger) -> dict[str, Any]:
    first_bad = None
    if ledger.first_bad:
        line, reason, excerpt = ledger.first_bad
        first_bad = [line, reason, excerpt.decode("latin-1")]
    return {
        "counts": ledger.counts,
        "reasons": ledger.reasons,
        "lengths": sorted(ledger.lengths.items()),
        "first_bad": first_bad,
    }


def _restore_ledger(ledger: Ledger, state: dict[str, Any]) -> None:
    ledger.counts, ledger.reasons = Counter(state["counts"]), Counter(state["reasons"])
    ledger.lengths = Counter(dict(state["lengths"]))
    if state["first_bad"]:
        line, reason, excerpt = state["first_bad"]
        ledger.first_bad = (line, reason, excerpt.encode("latin-1"))


def _write_shard(file: BinaryIO, shard: Shard) -> list[int]:
    """Append a shard's buffers; returns their sizes in bytes."""
    return [file.write(buffer) for buffer in (shard.data, shard.digests, shard.sizes.tobytes(), shard.characters.tobytes())]


def _read_pending(path: Path, sizes: dict[str, list[int]]) -> Iterator[tuple[str, Shard]]:
    expected = sum(map(sum, sizes.values()))
    if path.stat().st_size != expected:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, not {expected}")
    with path.open("rb") as file:
        for split, (data, digests, lengths, characters) in sizes.items():
            shard = Shard()
            shard.data, shard.digests = bytearray(file.read(data)), bytearray(file.read(digests))
            shard.sizes, shard.characters = array("q", file.read(lengths)), array("q", file.read(characters))
            yield split, shard
