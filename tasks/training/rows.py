"""Rows of many Arrow streams by one number: a file is opened when a row of it is first asked for.

So a rank is at work after the same time whether it trains on ten shards or on ten thousand, and reads its own rows alone.

Reads   BLOCKS, EXAMPLES   Arrow IPC streams, memory-mapped
"""

import mmap
import resource
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from tasks.errors import CorpusError

Row = dict[str, np.ndarray]

# Each open file is a file descriptor and a memory map, of which Linux gives a process 65,530 (vm.max_map_count).
MOST_OPEN = 16_384
ARRIVAL_SECONDS = 600.0  # for a file that is on its way here
POLL_SECONDS = 0.05


class OpenFile:
    """The rows of one stream; nothing is copied until a row is asked for."""

    def __init__(self, name: str) -> None:
        try:
            with Path(name).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            batches = list(pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(mapped))))
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            raise CorpusError(f"{name}: cannot be read as an Arrow stream ({error}); verify the store") from error
        self.ends = list(accumulate(batch.num_rows for batch in batches))
        self.columns = [{field: _rows_of(batch.column(field)) for field in batch.schema.names} for batch in batches]

    def row(self, index: int) -> Row:
        batch = bisect_right(self.ends, index)
        within = index - (self.ends[batch - 1] if batch else 0)
        return {name: rows[within] for name, rows in self.columns[batch].items()}


def _rows_of(column: pa.FixedSizeListArray) -> np.ndarray:
    """A column of fixed-size lists as an int32 array (rows, T): a view."""
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=True)
    return values.reshape(len(column), -1) if len(column) else values.reshape(0, 0)


class Rows(Sequence[Row]):
    """The rows of ``files`` one after the other; ``counts``: how many each has, where that is known.

    is_arriving: a file that is not there yet is on its way, and is waited for.
    """

    def __init__(self, files: Sequence[str], counts: Sequence[int] | None = None, *, is_arriving: bool = False) -> None:
        self.files, self.is_arriving = files, is_arriving
        self._open: OrderedDict[int, OpenFile] = OrderedDict()
        self._most_open = most_open()
        if counts is None:
            counts = [(self._file(number).ends or [0])[-1] for number in range(len(files))]
        self.ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.ends, index)
        return self._file(number).row(index - (self.ends[number - 1] if number else 0))

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def _file(self, number: int) -> OpenFile:
        found = self._open.get(number)
        if found is None:
            if self.is_arriving:
                _await_file(Path(self.files[number]))
            found = self._open[number] = OpenFile(self.files[number])
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return found


def _await_file(path: Path) -> None:
    deadline = time.monotonic() + ARRIVAL_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise CorpusError(
                f"{path}: not here after {ARRIVAL_SECONDS:g} s; look at this node's way to the store, and run again"
            )
        time.sleep(POLL_SECONDS)


def most_open() -> int:
    """How many files may be open at once; raises this process's own limit, which is 1,024 by custom, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_OPEN
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(MOST_OPEN, soft // 2)
