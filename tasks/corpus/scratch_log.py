"""Records of one size in a scratch file, which a build that goes on reads back as far as its journal vouches for them.

Writes  .scratch/<name>
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from tasks.store.digest import write_all

READ_BYTES = 4 << 20


class ScratchLog:
    """Appends records and reads any of them."""

    def __init__(self, file: FileIO, record_bytes: int) -> None:
        self.file, self.record_bytes = file, record_bytes

    def append(self, records: bytes) -> None:
        write_all(self.file, records)

    def record(self, number: int) -> bytes:
        return os.pread(self.file.fileno(), self.record_bytes, number * self.record_bytes)

    def all(self) -> Iterator[bytes]:
        """Every record, so many at a time that memory stays small."""
        step, end = max(READ_BYTES // self.record_bytes, 1) * self.record_bytes, self.file.tell()
        for start in range(0, end, step):
            yield os.pread(self.file.fileno(), min(step, end - start), start)

    def settle(self) -> int:
        """Put all of it on disk; returns its bytes."""
        os.fsync(self.file.fileno())
        return self.file.tell()


@contextmanager
def open_log(path: Path, record_bytes: int, num_bytes: int = 0) -> Iterator[ScratchLog]:
    """A log of which the first ``num_bytes`` are kept."""
    with FileIO(path, "r+" if num_bytes else "w+") as file:
        file.truncate(num_bytes)
        file.seek(num_bytes)
        yield ScratchLog(file, record_bytes)
