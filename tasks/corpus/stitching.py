"""The ranges of an archive to documents shards: the lines between ranges stitched, duplicates dropped, boundaries drawn.

Reads   range-shard      rows.parquet, quarantine.parquet, head, rest, pieces.json
        range-shard      train.parquet, validation.parquet    by the workers that write the shards
Writes  documents-shard  documents.parquet                    DOCUMENTS: text

What one reader would have seen, in its order, is seen here as a digest and sizes a document; no text but the stitched lines'
passes through. The shards are cut by the same Sharder, so that they are the same shards.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import orjson
import pyarrow.parquet as pq

from tasks.corpus.boundaries import DIGEST_BYTES, Document, Shard, Sharder, is_validation, read_document
from tasks.corpus.bzip2 import Piece, RangeError
from tasks.corpus.document_shards import read_texts, store_shard
from tasks.corpus.judge import Ledger, Outcome
from tasks.corpus.quarantine import Quarantine
from tasks.corpus.ranges import RangeRows
from tasks.corpus.reader import BLANK, BYTE_ORDER_MARK, MAX_LINE_BYTES, BadLine, Row, parse_line
from tasks.machine import Machine
from tasks.schemas import SPLITS
from tasks.store import Artifact, ArtifactStore, Digest

STITCHED = -1  # in the place of a range: a document of a line that two ranges share


# A range by its number, or STITCHED, and runs of rows in it: the first, and the one behind the last. Of a whole archive's
# documents only these are held.
Place = tuple[int, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Origin:
    """Where a shard's documents lie: rows of a split's file of one range, or one stitched document."""

    source: Artifact | bytes
    split: str
    runs: tuple[tuple[int, int], ...] = ()  # first row, and the row behind the last


@dataclass(frozen=True)
class ShardToWrite:
    """One documents shard, as a worker is told of it. Picklable."""

    name: str
    identity: Digest
    store: ArtifactStore
    origins: tuple[Origin, ...]


def write_in_pool(item: ShardToWrite) -> Artifact:
    """Store one documents shard in this worker."""
    return store_shard(item.store, Machine(), item.identity, lambda: _gathered(item.origins))


def _gathered(origins: Sequence[Origin]) -> Shard:
    shard = Shard()
    for origin in origins:
        if isinstance(origin.source, bytes):
            shard.append(read_document(origin.source.decode()))
            continue
        for text in _rows_of(origin.source.file(f"{origin.split}.parquet"), origin.runs):
            shard.append(read_document(text))
    return shard


def _rows_of(path: Path, runs: Sequence[tuple[int, int]]) -> Iterator[str]:
    number = 0
    for texts in read_texts(path):
        for first, last in runs:
            yield from texts[max(first - number, 0) : max(last - number, 0)]
        number += len(texts)


class _Outline(Shard):
    """A shard that is being cut, without its texts."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def add(self, digest: bytes, num_bytes: int, num_characters: int) -> None:
        self.digests += digest
        self.sizes.append(num_bytes)
        self.characters.append(num_characters)
        self.num_bytes += num_bytes

    def split_off(self, num_documents: int) -> Shard:
        head = super().split_off(num_documents)
        self.num_bytes -= sum(head.sizes)
        return head

    @property
    def size(self) -> int:
        return self.num_bytes + len(self.digests)


class Cutter:
    """Cuts one split into shards, and knows where the documents of each lie."""

    def __init__(self, split: str, greatest_bytes: int) -> None:
        self.split, self.sharder = split, Sharder(greatest_bytes)
        self.outline = self.sharder.pending = _Outline()
        self.places: list[tuple[int, int]] = []  # of the documents that wait: the range, and the row of the split's file in it
        self.cut: list[tuple[Digest, list[Place]]] = []

    def add(self, digest: bytes, num_bytes: int, num_characters: int, place: tuple[int, int]) -> None:
        self.outline.add(digest, num_bytes, num_characters)
        self.places.append(place)
        if self.outline.size > self.sharder.greatest_bytes:
            self._keep(self.sharder.split())

    def finish(self) -> None:
        for shard in self.sharder.finish():
            self._keep(shard)

    def _keep(self, shard: Shard) -> None:
        grouped = groupby(self.places[: len(shard)], lambda place: place[0])
        self.cut.append((shard.identity, [(number, tuple(runs_of([row for _, row in some]))) for number, some in grouped]))
        self.places = self.places[len(shard) :]


# Which of documents, told by their digests, come for the first time.
Firsts = Callable[[list[bytes]], list[bool]]


class Stitcher:
    """Takes the ranges in order, and tells ledger, quarantine and cutters what one reader would have."""

    def __init__(
        self,
        cutters: dict[str, Cutter],
        ledger: Ledger,
        quarantine: Quarantine,
        *,
        judge_line: Callable[[Row], Outcome],
        split_of: Callable[[bytes], str],
        check_bad: Callable[[int], None],
        firsts: Firsts | None,
    ) -> None:
        self.cutters, self.ledger, self.quarantine = cutters, ledger, quarantine
        self.judge_line, self.split_of, self.check_bad, self.firsts = judge_line, split_of, check_bad, firsts
        self.stitched: list[bytes] = []
        self.ranges: list[Artifact] = []
        self.carry = b""
        self.line = self.num_bytes = 0
        self.pieces: list[Piece] = []

    def take(self, one: Artifact) -> None:
        """The next range."""
        self.ranges.append(one)
        self.num_bytes += one.stats["num_bytes"]
        self.pieces += [Piece(*piece) for piece in orjson.loads(one.file("pieces.json").read_bytes())]
        head, rest = one.file("head").read_bytes(), one.file("rest").read_bytes()
        if one.stats["has_line_end"]:
            self._stitch((self.carry + head)[:-1])
            self._take_lines(one)
            self.carry = b""
        self.carry += rest
        if max(one.stats["longest_line"], len(self.carry)) > MAX_LINE_BYTES // 2:
            raise RangeError(f"a line of more than {MAX_LINE_BYTES // 2} bytes")

    def finish(self, num_behind: int) -> None:
        """The end of the last range, of which the last ``num_behind`` bytes lie behind the archive's one file."""
        if num_behind < 0 or num_behind > len(self.carry) or any(self.carry[len(self.carry) - num_behind :]):
            raise RangeError(f"{num_behind} bytes behind the archive's file are not all zeros")
        if last := self.carry[: len(self.carry) - num_behind]:
            self._stitch(last)
        for cutter in self.cutters.values():
            cutter.finish()

    def shards(self, store: ArtifactStore) -> list[ShardToWrite]:
        """What is to be written, in order."""
        return [
            ShardToWrite(f"{split}/{number:05d}", identity, store, tuple(self._origins(split, places)))
            for split, cutter in self.cutters.items()
            for number, (identity, places) in enumerate(cutter.cut)
        ]

    def _origins(self, split: str, places: list[Place]) -> Iterator[Origin]:
        for number, runs in places:
            if number == STITCHED:
                yield from (Origin(self.stitched[row], split) for first, last in runs for row in range(first, last))
            else:
                yield Origin(self.ranges[number], split, runs)

    def _stitch(self, line: bytes) -> None:
        if self.line == 0:
            line = line.removeprefix(BYTE_ORDER_MARK)
        self.line += 1
        row = Row(self.line, parse_line(line), line)
        outcome = self.judge_line(row)
        if isinstance(outcome, Document):
            if self._is_first([outcome.digest])[0]:
                self.stitched.append(outcome.data)
                place = STITCHED, len(self.stitched) - 1
                self._add(self.split_of(outcome.digest), outcome.digest, len(outcome.data), outcome.num_characters, place)
            return
        self.ledger.enter(row, outcome)
        if isinstance(outcome, BadLine) and outcome is not BLANK:
            self.quarantine.add(self.line, outcome)
            self.check_bad(self.line)

    def _take_lines(self, one: Artifact) -> None:
        """What the worker made of the range's whole lines."""
        self._take_bad(one)
        self.ledger.counts.update({name: n for name, n in one.stats["counts"].items() if name != "quarantined"})
        self.ledger.reasons.update({name: n for name, n in one.stats["reasons"].items() if name})
        rows, number = RangeRows(one.file("rows.parquet")), len(self.ranges) - 1
        seen = dict.fromkeys(SPLITS, 0)
        kept = zip(rows.digests, rows.sizes, rows.characters, self._is_first(rows.digests), strict=True)
        for digest, num_bytes, num_characters, is_first in kept:
            split = self.split_of(digest)
            if is_first:
                self._add(split, digest, num_bytes, num_characters, (number, seen[split]))
            seen[split] += 1
        self.line += one.stats["num_lines"]

    def _take_bad(self, one: Artifact) -> None:
        for entry in pq.read_table(one.file("quarantine.parquet")).to_pylist():
            bad = BadLine(entry["reason"], entry["excerpt"])
            line = self.line + entry["line"]
            self.ledger.enter(Row(line, None, b""), bad)
            self.quarantine.add(line, bad)
            self.check_bad(line)

    def _is_first(self, digests: list[bytes]) -> list[bool]:
        firsts = self.firsts(digests) if self.firsts else [True] * len(digests)
        self.ledger.counts["duplicates"] += firsts.count(False)
        return firsts

    def _add(self, split: str, digest: bytes, num_bytes: int, num_characters: int, place: tuple[int, int]) -> None:
        assert len(digest) == DIGEST_BYTES
        self.ledger.counts["documents"] += 1
        self.ledger.lengths[num_characters.bit_length()] += 1
        self.cutters[split].add(digest, num_bytes, num_characters, place)


def split_of(digest: bytes, fraction: float) -> str:
    """The split of a document."""
    return "validation" if is_validation(digest, fraction) else "train"


def runs_of(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rising numbers as runs: the first, and the one behind the last."""
    first = last = rows[0]
    for row in rows[1:]:
        if row != last + 1:
            yield first, last + 1
            first = row
        last = row
    yield first, last + 1
