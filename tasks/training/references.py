"""Training rows to what they are made of: the shard and the documents behind a block, the pack of examples behind a row.

Reads   manifests of blocks-shard, and by them tokens-shard: tokens.arrow, of which only the rows' lengths
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from tasks.store import Artifact, ArtifactStore, Digest, ShardEntry, store_of


@dataclass(frozen=True)
class Reference:
    """One training row, or what one shard has in it; ``documents``: the first and the last row of the shard's documents."""

    file: str
    row: int
    shard: str | None = None
    documents: tuple[int, int] | None = None

    def __str__(self) -> str:
        row = f"row {self.row} of {self.shard or self.file}"
        if self.documents is None:
            return row
        first, last = self.documents
        return f"{self.shard} {f'document {first}' if first == last else f'documents {first} to {last}'}"


def row_references(
    rows: Sequence[int], files: Sequence[Path], counts: Sequence[int], origin: Artifact | None
) -> list[list[Reference]]:
    """What each row is made of, as far as the store still tells; a block of tails is made of several shards.

    rows: numbers over all ``files``, whose rows are ``counts``. origin: the blocks or the examples that the files are of.
    """
    ends = list(accumulate(counts))
    found = []
    for row in rows:
        place = bisect_right(ends, row)
        within = row - (ends[place] - counts[place])
        found.append(list(_references(origin, files[place], place, within)))
    return found


def _references(origin: Artifact | None, file: Path, place: int, row: int) -> Iterator[Reference]:
    if origin is None or origin.kind != "blocks":
        yield Reference(file.name, row)
        return
    size, shards = origin.stats["block_size"], list(origin.shards("train"))
    if place < len(shards):
        yield _reference(origin, shards[place], Reference(file.name, row), range(row * size, (row + 1) * size))
        return
    start = 0
    for entry in shards:  # the tails, end to end
        tail, first = entry.stats.get("num_tail", 0), entry.stats.get("num_tokens", 0) - entry.stats.get("num_tail", 0)
        low, high = max(row * size, start), min((row + 1) * size, start + tail)
        if low < high:
            yield _reference(origin, entry, Reference(file.name, row), range(first + low - start, first + high - start))
        start += tail
    if not start:  # shards that do not tell
        yield Reference(file.name, row)


def _reference(origin: Artifact, entry: ShardEntry, row: Reference, ids: range) -> Reference:
    """What of a row are these ids of one shard."""
    tokens = _tokens_of(store_of(origin), entry)
    if tokens is None:
        return replace(row, shard=entry.name)
    ends = np.cumsum(document_lengths(tokens.file("tokens.arrow")))
    first, last = (int(np.searchsorted(ends, place, side="right")) for place in (ids[0], ids[-1]))
    return replace(row, shard=entry.name, documents=(first, last))


def _tokens_of(store: ArtifactStore, entry: ShardEntry) -> Artifact | None:
    """The tokens shard that a blocks shard was packed from; None where the store no longer holds it."""
    shard = store.load(entry.kind, entry.key)
    kind, _, key = shard.manifest.produced_by.get("inputs", {}).get("tokens", "").partition("/") if shard else ("", "", "")
    return store.find(kind, Digest(key)) if key else None


def document_lengths(path: Path) -> np.ndarray:
    """The ids of every document of a tokens shard: int64 (num_documents,)."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        columns = [reader.get_batch(number).column(0) for number in range(reader.num_record_batches)]
        lengths = [
            np.diff(np.frombuffer(one.buffers()[1], np.int64, len(one) + 1, one.offset * 8)) for one in columns if len(one)
        ]
        return np.concatenate([np.empty(0, np.int64), *lengths])
