"""Bad lines, set apart with their number, the reason and how they begin.

Writes  documents  quarantine.parquet  QUARANTINE: line, reason, excerpt
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.corpus.reader import BadLine
from tasks.schemas import QUARANTINE

ROWS = 10_000  # a row group, and the bad lines held in memory


class Quarantine:
    """Appends bad lines to a scratch file, so that a build which goes on later keeps those that it has."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def add(self, line: int, bad: BadLine) -> None:
        # Latin-1: every byte is a character, and an excerpt need not be UTF-8.
        entry = {"line": line, "reason": bad.reason, "excerpt": bad.excerpt.decode("latin-1")}
        self.file.write(orjson.dumps(entry) + b"\n")

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


def _row(line: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = orjson.loads(line)
    return {**entry, "excerpt": entry["excerpt"].encode("latin-1")}
