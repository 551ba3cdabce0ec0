"""Bad lines, set apart with their number, the reason and how they begin.

Writes  documents, examples  quarantine.parquet  QUARANTINE: line, reason, excerpt
"""

import os
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.corpus.reader import BadLine
from tasks.schemas import QUARANTINE

ROWS = 10_000  # a row group, and the bad lines held in memory
WAITING_BYTES = 1 << 20
# Of what is refused in any order: Arrow's own row group, and the rows that are turned into a table at once, a whole number of
# Parquet's write batches of 1024, so that the pages are those of a table written at once.
GROUP_ROWS, BATCH_ROWS = 1 << 20, 10 << 10


class Quarantine:
    """Appends bad lines to a scratch file, so that a build which goes on later keeps those that it has."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def add(self, line: int, bad: BadLine) -> None:
        self.file.write(_entry(line, bad))

    def num_bytes(self) -> int:
        """How long the scratch file is, with all that was added, on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()


@contextmanager
def open_quarantine(scratch: Path, num_bytes: int) -> Iterator[Quarantine]:
    """A scratch file of which the first ``num_bytes`` are kept."""
    with scratch.open("r+b" if num_bytes else "w+b") as file:
        file.truncate(num_bytes)
        file.seek(0, os.SEEK_END)
        yield Quarantine(file)


def write_quarantine(scratch: Path, target: Path) -> None:
    """The scratch file as a QUARANTINE table."""
    with scratch.open("rb") as source, pq.ParquetWriter(target, QUARANTINE, compression="zstd") as writer:
        while lines := list(islice(source, ROWS)):
            writer.write_table(pa.Table.from_pylist([_row(line) for line in lines], schema=QUARANTINE))


class Refusals:
    """Bad lines that come in any order, each once; in memory are their numbers and places only, 16 bytes each."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.lines, self.places, self.waiting, self.size = array("q"), array("q"), bytearray(), 0
        scratch.write_bytes(b"")

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, line: int, bad: BadLine) -> None:
        self.lines.append(line)
        self.places.append(self.size + len(self.waiting))
        self.waiting += _entry(line, bad)
        if len(self.waiting) >= WAITING_BYTES:
            self._flush()

    def first(self) -> tuple[int, str]:
        """The number of the first bad line, and what is wrong with it."""
        row = next(self.rows())
        return row["line"], row["reason"]

    def rows(self) -> Iterator[dict[str, Any]]:
        """All of them as QUARANTINE has them, in the order of their lines."""
        self._flush()
        with self.scratch.open("rb") as source:
            for number in np.argsort(np.frombuffer(self.lines, np.int64), kind="stable"):
                source.seek(self.places[number])
                yield _row(source.readline())

    def _flush(self) -> None:
        with self.scratch.open("ab") as file:
            file.write(self.waiting)
        self.size += len(self.waiting)
        self.waiting = bytearray()


def write_rows(rows: Iterable[dict[str, Any]], target: Path) -> None:
    """Write rows as a QUARANTINE table, in row groups as Arrow makes them of a whole table."""
    rows = iter(rows)
    with pq.ParquetWriter(target, QUARANTINE, compression="zstd") as writer:
        is_first = True
        while (table := _table(islice(rows, GROUP_ROWS))).num_rows or is_first:
            writer.write_table(table)
            is_first = False


def _table(rows: Iterator[dict[str, Any]]) -> pa.Table:
    batches = []
    while some := list(islice(rows, BATCH_ROWS)):
        batches.append(pa.RecordBatch.from_pylist(some, schema=QUARANTINE))
    return pa.Table.from_batches(batches, schema=QUARANTINE)


def _entry(line: int, bad: BadLine) -> bytes:
    # Latin-1: every byte is a character, and an excerpt need not be UTF-8.
    return orjson.dumps({"line": line, "reason": bad.reason, "excerpt": bad.excerpt.decode("latin-1")}) + b"\n"


def _row(line: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = orjson.loads(line)
    return {**entry, "excerpt": entry["excerpt"].encode("latin-1")}
