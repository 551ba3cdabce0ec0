"""An archive as a stream of lines or rows, without unpacking it to disk.

Reads   one file of any name: JSON Lines or one JSON array, plain or as .gz, .bz2, .zst, each alone or as the single regular
        member of a tar; or Parquet
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.corpus.compressed import BEGINNING, Mark, Readable
from tasks.corpus.members import Member, open_member
from tasks.errors import CorpusError
from tasks.machine import Advance

BLOCK_BYTES = 1 << 20  # one read: the rows parsed at once, even of the shortest lines, stay under 100 MB
EXCERPT_BYTES = 200  # enough to recognize a line by
MAX_LINE_BYTES = 64 << 20  # a line is held whole in memory, and a text of 64 MB is no document
BATCH_ROWS = 1_000
PARQUET_MAGIC = b"PAR1"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot be read: why, and its first bytes as they stand."""

    reason: str
    excerpt: bytes


BLANK: Final = BadLine("blank", b"")


class Row(NamedTuple):
    """One row of an archive. line: from 1 (of an array or a table, the row's number). raw: the line, where there is one."""

    line: int
    value: Any  # a JSON value, or a BadLine
    raw: bytes


@dataclass(frozen=True)
class Position:
    """A place between two rows: the number of the next line, the bytes of the member before it, where to begin to decompress."""

    line: int = 1
    offset: int = 0
    mark: Mark = BEGINNING


START: Final = Position()


class Batch(NamedTuple):
    """Rows in order. end: tells the position behind them; None where reading cannot begin there (a JSON array)."""

    rows: list[Row]
    end: Callable[[], Position] | None = None


def read_records(path: Path, advance: Advance = lambda amount: None) -> Iterator[tuple[int, object | BadLine]]:
    """Every line of JSON Lines, element of a JSON array or row of a Parquet table, with its number from 1; no blank lines.

    Raises CorpusError where the archive cannot be read as a whole.
    """
    for batch in read_batches(path, advance):
        yield from ((row.line, row.value) for row in batch.rows if row.value is not BLANK)


def read_batches(
    path: Path,
    advance: Advance,
    num_threads: int = 1,
    columns: tuple[str, ...] | None = None,
    start: Position = START,
) -> Iterator[Batch]:
    """Batches of rows, from ``start`` on.

    num_threads: for decompression. columns: what to read of a Parquet table, None for all.
    """
    if is_parquet(path):
        yield from _read_parquet(path, advance, columns, start.line)
        return
    with open_member(path, advance, num_threads, start.offset, start.mark) as member:
        head = _head(path, member) if start == START else member.read(BLOCK_BYTES)
        if start == START and head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
            yield from _read_array(path, member, head)
            return
        for lines, end in split_lines(path, member, head, start):
            rows = [Row(number, parse_line(line), line) for number, line in enumerate(lines, end.line - len(lines))]
            yield Batch(rows, partial(_marked, member, end))


def _marked(member: Member, end: Position) -> Position:
    return replace(end, mark=member.mark(end.offset))


def parse_line(line: bytes) -> Any:
    """The JSON value of a line; a BadLine where it is not JSON or not UTF-8; BLANK where nothing is on it."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if not line.strip():
            return BLANK
        reason = "not UTF-8" if not _is_utf8(line) else f"not JSON: {error.msg} at character {error.pos}"
        return BadLine(reason, line[:EXCERPT_BYTES])


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def split_lines(path: Path, member: Readable, head: bytes, start: Position) -> Iterator[tuple[list[bytes], Position]]:
    """Batches of lines, each with the position behind it; ``head`` is what was read of the member at ``start``."""
    line, offset, rest, block = start.line, start.offset, b"", head
    if start == START and head.startswith(BYTE_ORDER_MARK):
        block, offset = head[len(BYTE_ORDER_MARK) :], len(BYTE_ORDER_MARK)
    while block:
        joined = rest + block
        *lines, rest = joined.split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise CorpusError(
                f"{path}: line {line + len(lines)} is longer than {MAX_LINE_BYTES} bytes; write one document a line"
            )
        line, offset = line + len(lines), offset + len(joined) - len(rest)
        if lines:
            yield lines, Position(line, offset)
        block = member.read(BLOCK_BYTES)
    if rest:
        yield [rest], Position(line + 1, offset + len(rest))


def _head(path: Path, member: Readable) -> bytes:
    head = member.read(BLOCK_BYTES)
    if not head:
        raise CorpusError(f"{path}: the archive is empty; nothing can be made of it: fetch it again or name another")
    if head.startswith(PARQUET_MAGIC):
        raise CorpusError(f"{path}: Parquet inside another file, which cannot be streamed; name the .parquet file itself")
    return head


def _read_array(path: Path, member: Readable, head: bytes) -> Iterator[Batch]:
    """The elements of one JSON array, which is held whole in memory."""
    blocks = [head.removeprefix(BYTE_ORDER_MARK)]
    while block := member.read(BLOCK_BYTES):
        blocks.append(block)
    try:
        values = orjson.loads(b"".join(blocks))
    except orjson.JSONDecodeError as error:
        raise CorpusError(f"{path}: begins as a JSON array, and is not one ({error}); mend it or write JSON Lines") from error
    for start in range(0, len(values), BATCH_ROWS):
        yield Batch([Row(number, value, b"") for number, value in enumerate(values[start : start + BATCH_ROWS], start + 1)])


def is_parquet(path: Path) -> bool:
    with path.open("rb") as source:
        return source.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC


def _read_parquet(path: Path, advance: Advance, columns: tuple[str, ...] | None, first: int) -> Iterator[Batch]:
    size, told, number = path.stat().st_size, 0, 1
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK_BYTES) as table:
            _check_columns(path, table.schema_arrow.names, columns)
            for batch in table.iter_batches(BATCH_ROWS, columns=columns):
                rows = [Row(line, value, b"") for line, value in enumerate(_values(batch), number)]
                number += batch.num_rows
                if number > first:
                    yield Batch(rows[max(first - (number - batch.num_rows), 0) :], partial(Position, number))
                position = size * (number - 1) // table.metadata.num_rows
                advance(position - told)
                told = position
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}: not readable as Parquet after row {number - 1} ({error}); fetch it again") from error


def _values(batch: pa.RecordBatch) -> list[Any]:
    """The rows as dictionaries; a BadLine for one whose text is not UTF-8, which Parquet does not see to."""
    try:
        values: list[Any] = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [BadLine("not UTF-8", error.object[:EXCERPT_BYTES])]
        return [value for number in range(batch.num_rows) for value in _values(batch.slice(number, 1))]
    return values


def _check_columns(path: Path, found: list[str], wanted: tuple[str, ...] | None) -> None:
    if missing := [name for name in wanted or () if name not in found]:
        raise CorpusError(f"{path}: no column {missing[0]}; it has {', '.join(found)}: name one of them in the recipe")
