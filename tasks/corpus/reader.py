"""An archive as a stream of lines or rows, without unpacking it to disk.

Reads   one file of any name: JSON Lines or one JSON array, plain or as .gz, .bz2, .zst, each alone or as the single regular
        member of a tar; or Parquet
"""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.corpus.compressed import Readable, open_decompressed
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


def read_records(path: Path, advance: Advance = lambda amount: None) -> Iterator[tuple[int, object | BadLine]]:
    """Every line of JSON Lines, element of a JSON array or row of a Parquet table, with its number from 1; no blank lines.

    Raises CorpusError where the archive cannot be read as a whole.
    """
    for batch in read_rows(path, advance):
        yield from ((row.line, row.value) for row in batch if row.value is not BLANK)


def read_lines(path: Path, advance: Advance = lambda amount: None) -> Iterator[tuple[int, bytes]]:
    """Every line, blank ones too, without its line feed, with its number from 1."""
    with open_member(path, advance) as member:
        for first, lines in split_lines(path, member, _head(path, member)):
            yield from enumerate(lines, first)


def read_rows(path: Path, advance: Advance, num_threads: int = 1, columns: tuple[str, ...] | None = None) -> Iterator[list[Row]]:
    """Batches of rows. num_threads: for decompression. columns: what to read of a Parquet table, None for all."""
    if is_parquet(path):
        yield from _read_parquet(path, advance, columns)
        return
    with open_member(path, advance, num_threads) as member:
        head = _head(path, member)
        if head.lstrip().startswith(b"["):
            yield from _read_array(path, member, head)
            return
        for first, lines in split_lines(path, member, head):
            yield [Row(number, parse_line(line), line) for number, line in enumerate(lines, first)]


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


def split_lines(path: Path, member: Readable, head: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Batches of lines, each with the number of its first line; ``head`` is what was read of the member already."""
    number, rest, block = 1, b"", head
    while block:
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise CorpusError(
                f"{path}: line {number + len(lines)} is longer than {MAX_LINE_BYTES} bytes; write one document a line"
            )
        if lines:
            yield number, lines
        number += len(lines)
        block = member.read(BLOCK_BYTES)
    if rest:
        yield number, [rest]


def _head(path: Path, member: Readable) -> bytes:
    head = member.read(BLOCK_BYTES)
    if not head:
        raise CorpusError(f"{path}: the archive is empty; nothing can be made of it: fetch it again or name another")
    if head.startswith(PARQUET_MAGIC):
        raise CorpusError(f"{path}: Parquet inside another file, which cannot be streamed; name the .parquet file itself")
    return head.removeprefix(BYTE_ORDER_MARK)


@contextmanager
def open_member(path: Path, advance: Advance, num_threads: int = 1) -> Iterator[Readable]:
    """Open an archive's one regular file as decompressed bytes; whether it is a tar is told by its first block."""
    with open_decompressed(path, lambda amount: None) as peeked:
        is_tar = _is_tar_header(_read_exactly(peeked, tarfile.BLOCKSIZE))
    with open_decompressed(path, advance, num_threads) as stream:
        if not is_tar:
            yield stream
            return
        # ignore_zeros: a second tar behind the first is seen, and refused, instead of being lost.
        try:
            archive = tarfile.open(  # noqa: SIM115 (closed below; opening reads the first header)
                fileobj=cast(Any, stream), mode="r|", bufsize=BLOCK_BYTES, ignore_zeros=True, tarinfo=_Header
            )
        except tarfile.ReadError as error:
            raise _damaged_tar(path, error) from error
        with archive:
            yield _Member(path, archive, stream)


def _read_exactly(stream: Readable, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


def _is_tar_header(block: bytes) -> bool:
    if len(block) < tarfile.BLOCKSIZE:
        return False
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return not any(block)  # a tar without members is all zeros
    return True


class _Header(tarfile.TarInfo):
    """A member's header. ``ignore_zeros`` passes over damaged ones too, and so over the members behind them: not here."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error


def _damaged_tar(path: Path, error: tarfile.ReadError) -> CorpusError:
    return CorpusError(f"{path}: the tar is truncated or damaged ({error}); fetch the archive again")


class _Member:
    """The bytes of a tar's one regular member; at its end, the rest of the tar is looked through too."""

    def __init__(self, path: Path, archive: tarfile.TarFile, stream: Readable) -> None:
        self.path, self.archive, self.stream = path, archive, stream
        info = self._next_regular()
        if info is None:
            raise CorpusError(f"{path}: a tar without a regular member; publish one with the corpus as its one file")
        self.name = info.name
        self.file = archive.extractfile(info)

    def read(self, size: int, /) -> bytes:
        assert self.file is not None
        try:
            if data := self.file.read(size):
                return data
            second = self._next_regular()
        except tarfile.ReadError as error:
            raise CorpusError(f"{self.path}: member {self.name} is truncated ({error}); fetch the archive again") from error
        if second:
            raise CorpusError(
                f"{self.path}: a second member {second.name} after {self.name}; publish a tar with one regular file"
                + (" (macOS adds ._ files: set COPYFILE_DISABLE=1)" if "._" in second.name + self.name else "")
            )
        while self.stream.read(BLOCK_BYTES):
            pass  # to its end, so that a damaged compressed stream is seen
        return b""

    def _next_regular(self) -> tarfile.TarInfo | None:
        """The next member, past plain folders. Raises CorpusError for what an archive may not hold."""
        try:
            while (info := self.archive.next()) is not None:
                self._check(info)
                if info.isreg():
                    return info
        except tarfile.ReadError as error:
            raise _damaged_tar(self.path, error) from error
        return None

    def _check(self, info: tarfile.TarInfo) -> None:
        place = PurePosixPath(info.name)
        if place.is_absolute() or ".." in place.parts:
            raise CorpusError(f"{self.path}: member {info.name} has an absolute or dotted path; do not trust this archive")
        if not info.isreg() and not info.isdir():
            kind = "a link" if info.issym() or info.islnk() else "a device or another special file"
            raise CorpusError(f"{self.path}: member {info.name} is {kind}; publish a tar with one regular file")


def _read_array(path: Path, member: Readable, head: bytes) -> Iterator[list[Row]]:
    """The elements of one JSON array, which is held whole in memory."""
    blocks = [head]
    while block := member.read(BLOCK_BYTES):
        blocks.append(block)
    try:
        values = orjson.loads(b"".join(blocks))
    except orjson.JSONDecodeError as error:
        raise CorpusError(f"{path}: begins as a JSON array, and is not one ({error}); mend it or write JSON Lines") from error
    for start in range(0, len(values), BATCH_ROWS):
        yield [Row(number, value, b"") for number, value in enumerate(values[start : start + BATCH_ROWS], start + 1)]


def is_parquet(path: Path) -> bool:
    with path.open("rb") as source:
        return source.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC


def _read_parquet(path: Path, advance: Advance, columns: tuple[str, ...] | None) -> Iterator[list[Row]]:
    size, told, number = path.stat().st_size, 0, 1
    try:
        with pq.ParquetFile(path, buffer_size=BLOCK_BYTES) as table:
            _check_columns(path, table.schema_arrow.names, columns)
            for batch in table.iter_batches(BATCH_ROWS, columns=columns):
                yield [Row(line, value, b"") for line, value in enumerate(_values(batch), number)]
                number += batch.num_rows
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
