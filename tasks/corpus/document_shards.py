"""Documents into their split's shards, each stored as soon as it is full, beside the reading of the next.

Writes  documents-shard  documents.parquet  DOCUMENTS: text
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from tasks.corpus.boundaries import Document, Shard, Sharder, is_validation
from tasks.machine import Machine
from tasks.schemas import DOCUMENTS, SPLITS
from tasks.store import Artifact, ArtifactStore, Built, Digest, ShardEntry, Spec, Work, shard_entry, stage

# A reader holds one row group, decoded: 5 MB at 2.3 KB a document. Raise the shard's revision when you change it.
ROW_GROUP_DOCUMENTS = 2_000

READ_BYTES = 1 << 20  # one read of a shard


class DocumentsShardSpec(Spec):
    """A shard is the same wherever it stands in a corpus: its documents decide."""

    documents: Digest = Field(description="SHA-256 of the SHA-256 of each document's text, in order")


class Shards:
    """Takes documents into their split, and stores every shard that is full. One at a time is being stored."""

    def __init__(self, work: Work, shard_bytes: int, validation_fraction: float, storing: ThreadPoolExecutor) -> None:
        self.work, self.fraction, self.storing = work, validation_fraction, storing
        self.sharders = {split: Sharder(shard_bytes) for split in SPLITS}
        self.entries: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
        self.unsettled: deque[tuple[str, Future[Artifact]]] = deque()

    def add(self, document: Document) -> None:
        split = "validation" if is_validation(document.digest, self.fraction) else "train"
        if shard := self.sharders[split].add(document):
            self._store(split, shard)

    def finish(self) -> tuple[ShardEntry, ...]:
        """Store what is left; the shards of all splits in order."""
        for split, sharder in self.sharders.items():
            for shard in sharder.finish():
                self._store(split, shard)
        self.settle()
        return tuple(entry for split in SPLITS for entry in self.entries[split])

    def settle(self) -> None:
        """Wait until every full shard is in the store."""
        while self.unsettled:
            split, storing = self.unsettled.popleft()
            entries = self.entries[split]
            entries.append(shard_entry(f"{split}/{len(entries):05d}", storing.result()))

    @property
    def num_full(self) -> int:
        """Shards that were full so far."""
        return len(self.unsettled) + sum(map(len, self.entries.values()))

    def _store(self, split: str, shard: Shard) -> None:
        self.settle()
        self.unsettled.append(
            (split, self.storing.submit(store_shard, self.work.store, self.work.machine, shard.identity, lambda: shard))
        )


@contextmanager
def open_shards(work: Work, shard_bytes: int, validation_fraction: float) -> Iterator[Shards]:
    """Shards to fill."""
    with ThreadPoolExecutor(1, thread_name_prefix="documents") as storing:
        yield Shards(work, shard_bytes, validation_fraction, storing)


def store_shard(store: ArtifactStore, machine: Machine, identity: Digest, shard: Callable[[], Shard]) -> Artifact:
    """The artifact of a shard, asked for and written only where the store does not hold it already."""

    @stage("documents-shard", revision=2)
    def build_documents_shard(work: Work, spec: DocumentsShardSpec) -> Built:
        documents = shard()
        assert documents.identity == identity, "a shard of other documents than it was cut from"
        write_shard(documents, work.folder / "documents.parquet")
        return Built(stats=documents.stats)

    return build_documents_shard(store, machine, DocumentsShardSpec(documents=identity))


def write_shard(shard: Shard, path: Path, compression: str = "zstd") -> None:
    """Write a shard's documents as DOCUMENTS."""
    offsets = np.concatenate(([0], np.cumsum(np.array(shard.sizes, np.int64))))
    texts = pa.LargeStringArray.from_buffers(len(shard), pa.py_buffer(offsets), pa.py_buffer(shard.data))
    table = pa.Table.from_arrays([texts], schema=DOCUMENTS)
    # No dictionary and no statistics: texts do not repeat, and their least and greatest tell nothing.
    pq.write_table(
        table, path, row_group_size=ROW_GROUP_DOCUMENTS, compression=compression, use_dictionary=False, write_statistics=False
    )


def open_documents(path: Path) -> Any:
    """A documents shard's table, to be closed. Read ahead, as Parquet does unless told, it holds the whole file."""
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES)


def read_texts(path: Path) -> Iterator[list[str]]:
    """A documents shard's texts, a row group at a time."""
    with open_documents(path) as table:
        for batch in table.iter_batches(ROW_GROUP_DOCUMENTS, columns=DOCUMENTS.names):
            yield batch["text"].to_pylist()
