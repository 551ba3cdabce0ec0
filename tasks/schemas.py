"""The Arrow schemas of every table in the store: what each stage may rely on finding in another's files.

DOCUMENTS   documents-shard  documents.parquet   one row a document
QUARANTINE  documents        quarantine.parquet  one row a bad line
RANGE_ROWS  range-shard      rows.parquet        one row a document of a range of an archive
TOKENS      tokens-shard     tokens.arrow        one row a document, closed by the end-of-document id
BLOCKS      blocks-shard     blocks.arrow        rows of exactly block_size ids (IPC stream, uncompressed, memory-mapped)
TAIL        blocks-shard     tail.arrow          the ids left over, fewer than block_size
EXAMPLES    examples         train.arrow         rows of exactly block_size ids, labels and positions (IPC stream)
                             validation.arrow
HELD_OUT    examples         held-out.arrow      one row a held-out conversation (IPC stream)
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SPLITS = ("train", "validation")

# What cross-entropy passes over (torch.nn.CrossEntropyLoss ignore_index).
IGNORED_LABEL = -100

DOCUMENTS = pa.schema([pa.field("text", pa.large_string(), nullable=False)])

QUARANTINE = pa.schema(
    [
        pa.field("line", pa.int64(), nullable=False),  # 1 is the first line of the archive
        pa.field("reason", pa.string(), nullable=False),
        pa.field("excerpt", pa.binary(), nullable=False),  # its first bytes as they stand: it may not be UTF-8
    ]
)

RANGE_ROWS = pa.schema(
    [
        pa.field("digest", pa.binary(32), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("num_characters", pa.int64(), nullable=False),
    ]
)

TOKENS = pa.schema([pa.field("input_ids", pa.large_list(pa.field("item", pa.int32(), nullable=False)), nullable=False)])

TAIL = pa.schema([pa.field("input_ids", pa.int32(), nullable=False)])

HELD_OUT = pa.schema(
    [
        # Everything before the last answer, through the chat template, up to where the model is to speak.
        pa.field("prompt_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("response", pa.string(), nullable=False),  # the last answer, without its end marker
    ]
)


def as_column(values: npt.NDArray[Any]) -> pa.Array:
    """A one-dimensional NumPy array as an Arrow array over the same memory. ``pa.array`` would import pandas: 0.2 s and 40 MB."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def as_ids(column: pa.Array) -> npt.NDArray[np.int32]:
    """An Arrow array of int32 without nulls as a NumPy array over the same memory; ``to_numpy`` would import pandas."""
    if len(column) == 0:  # it may have no buffer
        return np.empty(0, np.int32)
    return np.frombuffer(column.buffers()[1], np.int32, len(column), column.offset * 4)


def as_rows(values: npt.NDArray[np.int32], rows: pa.Field) -> pa.Array:
    """A table (n, block_size) as a column of that field, over the same memory."""
    return pa.FixedSizeListArray.from_arrays(as_column(values.reshape(-1)), type=rows.type)


def blocks_schema(block_size: int) -> pa.Schema:
    """BLOCKS: each row a FixedSizeList<int32> of block_size ids."""
    return pa.schema([_row_of("input_ids", block_size)])


def examples_schema(block_size: int) -> pa.Schema:
    """EXAMPLES: each row a pack of whole examples, filled up with padding.

    labels: IGNORED_LABEL = no loss. position_ids: restart at 0 for every example, and for the padding behind the last.
    """
    return pa.schema([_row_of(name, block_size) for name in ("input_ids", "labels", "position_ids")])


def _row_of(name: str, block_size: int) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("item", pa.int32(), nullable=False), block_size), nullable=False)
