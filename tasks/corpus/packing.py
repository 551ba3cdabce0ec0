"""Whole examples into rows: best fit, longest first, as few rows as that gives, and no example cut.

As Ding et al., "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830).
"""

from array import array
from collections import defaultdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.machine import Advance
from tasks.schemas import IGNORED_LABEL, as_rows, examples_schema

Ids = npt.NDArray[np.int32]
Learned = npt.NDArray[np.bool_]

BATCH_ROWS = 256  # 6 MB at a block_size of 2048


def pack_best_fit(lengths: Ids, block_size: int) -> list[list[int]]:
    """The numbers of the examples that share a row, in their order; rows in the order of their first example.

    lengths: int32 (num_examples,), tokens, each at most block_size. Costs about 1 microsecond an example.
    """
    assert lengths.size == 0 or (lengths.min() > 0 and lengths.max() <= block_size)
    rows: list[list[int]] = []
    rows_by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit n is set while a row has room for exactly n tokens more
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the least that fits
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
            rows[row].append(example)
        else:
            room, row = block_size, len(rows)
            rows.append([example])
        rows_by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return sorted(sorted(row) for row in rows)


class Packer:
    """Takes the examples of one split in order and writes them as packed rows.

    Ids wait in two files in ``scratch`` (5 bytes a token), not in memory: there an example costs the 4 bytes of its length.
    """

    def __init__(self, scratch: Path, split: str, block_size: int) -> None:
        self.block_size = block_size
        self.lengths = array("i")
        self.num_supervised_tokens = 0
        self.rows: list[list[int]] = []  # once written: the numbers of the examples of each row
        self._ids, self._learned = (scratch / f"{split}.{name}" for name in ("ids", "learned"))
        self._files: list[BinaryIO] = [self._ids.open("wb"), self._learned.open("wb")]

    def add(self, input_ids: Ids, labels: Ids) -> None:
        """Keep one example of at most block_size ids."""
        is_learned = labels != IGNORED_LABEL
        self._files[0].write(input_ids.astype(np.int32, copy=False).data)
        self._files[1].write(is_learned.data)
        self.lengths.append(len(input_ids))
        self.num_supervised_tokens += int(np.count_nonzero(is_learned))

    def write(self, target: Path, padding_id: int, advance: Advance) -> int:
        """Pack, and write EXAMPLES to ``target``; returns the number of rows. Without an example there is no file."""
        for file in self._files:
            file.close()
        lengths = np.array(self.lengths, np.int32)
        rows = self.rows = pack_best_fit(lengths, self.block_size)
        if not rows:
            return 0
        ids, is_learned = np.memmap(self._ids, np.int32, "r"), np.memmap(self._learned, bool, "r")
        starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        schema = examples_schema(self.block_size)
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for first in range(0, len(rows), BATCH_ROWS):
                columns = _empty_rows(len(rows[first : first + BATCH_ROWS]), self.block_size, padding_id)
                for number, row in enumerate(rows[first : first + BATCH_ROWS]):
                    spans = [slice(starts[example], starts[example + 1]) for example in row]
                    fill_row([(ids[span], is_learned[span]) for span in spans], *(column[number] for column in columns))
                writer.write(_batch(columns, schema))
                advance(sum(map(len, rows[first : first + BATCH_ROWS])))
        return len(rows)


def fill_row(examples: list[tuple[Ids, Learned]], input_ids: Ids, labels: Ids, position_ids: Ids) -> None:
    """Put examples into one row, end to end; position_ids restart at each, and at the padding behind the last."""
    at = 0
    for ids, is_learned in examples:
        end = at + len(ids)
        input_ids[at:end] = ids
        labels[at:end] = np.where(is_learned, ids, np.int32(IGNORED_LABEL))
        position_ids[at:end] = np.arange(len(ids), dtype=np.int32)
        at = end
    position_ids[at:] = np.arange(len(position_ids) - at, dtype=np.int32)


def _empty_rows(num_rows: int, block_size: int, padding_id: int) -> tuple[Ids, Ids, Ids]:
    return (
        np.full((num_rows, block_size), padding_id, np.int32),
        np.full((num_rows, block_size), IGNORED_LABEL, np.int32),
        np.zeros((num_rows, block_size), np.int32),
    )


def _batch(columns: tuple[Ids, Ids, Ids], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [as_rows(column, field) for column, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
