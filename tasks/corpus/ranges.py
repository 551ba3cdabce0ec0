"""One archive read by many machines: each takes a range of its bytes, and the lines that are whole in it.

Reads   archive      archive             bzip2 or plain, JSON Lines or a tar of it: a range of the bytes
Writes  range-shard  train.parquet       DOCUMENTS: the documents of each split, in the archive's order
                     validation.parquet
                     rows.parquet        RANGE_ROWS: a row each document, in the archive's order: digest, sizes
                     quarantine.parquet  QUARANTINE: bad lines, numbered within the range
                     head, rest          the bytes up to the range's first line end, and behind its last
                     pieces.json         which blocks were decoded: see tasks.corpus.bzip2

A line that two ranges share is whole once rest and head lie together; whoever has all ranges reads it: tasks.corpus.stitching.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from tasks.corpus.boundaries import Document, Shard, is_validation
from tasks.corpus.bzip2 import MOST_BLOCK_BYTES, Piece, decode_range
from tasks.corpus.document_shards import write_shard
from tasks.corpus.judge import Dropped, judge
from tasks.corpus.quality import CharacterRatio, filters_of
from tasks.corpus.quarantine import open_quarantine, write_quarantine
from tasks.corpus.reader import BLANK, BadLine, Row, parse_line
from tasks.corpus.shards import ShardWork
from tasks.machine import Machine, give_back_memory
from tasks.schemas import RANGE_ROWS, SPLITS
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, stage
from tasks.store.lease import no_longer

# Of texts that are read once and then thrown away: it costs half of what zstd does.
COMPRESSION = "lz4"


class RangeSpec(Spec):
    """Which bytes, and what of the documents stage decides line by line."""

    start: int = Field(ge=0, description="the range's first byte in the archive's file")
    num_bytes: int = Field(ge=1, description="its bytes")
    codec: str | None = Field(None, description="bz2, or None for bytes that are not compressed")
    skip: int = Field(0, ge=0, description="decompressed bytes before the first line: a tar's header")
    text_field: str = Field(description="the field of each line that holds the text")
    min_characters: int | None = Field(None, description="drop a document of fewer characters")
    max_characters: int | None = Field(None, description="drop a document of more characters")
    character_ratios: tuple[CharacterRatio, ...] | None = Field(None, description="drop a document by its characters")
    validation_fraction: float = Field(description="the share of documents in the validation split")


@dataclass(frozen=True)
class RangeWork(ShardWork):
    """One range to read, and the store that is to have it. Picklable."""

    store: ArtifactStore


def read_in_pool(item: ShardWork) -> Artifact:
    """Read one range in this worker."""
    assert isinstance(item, RangeWork)
    assert isinstance(item.spec, RangeSpec)
    with no_longer():  # who gave the work holds off the collector, and removes the store where it is in a scratch folder
        artifact = build_range(item.store, Machine(), item.spec, **item.inputs)
    give_back_memory()
    return artifact


@stage("range-shard", revision=2)
def build_range(work: Work, spec: RangeSpec, archive: Artifact) -> Built:
    """Decode a range, judge its whole lines, and leave its two ends to be stitched."""
    decoded, pieces = _decoded(spec, archive)
    text = decoded[spec.skip :]
    first, last = _line_ends(text)
    (work.folder / "head").write_bytes(text[:first])
    (work.folder / "rest").write_bytes(text[last:])
    (work.folder / "pieces.json").write_bytes(orjson.dumps([tuple(piece) for piece in pieces]))
    counts = _sort_lines(work, spec, text[first:last])
    return Built({**counts, "num_bytes": len(decoded), "has_line_end": last > 0})


def _decoded(spec: RangeSpec, archive: Artifact) -> tuple[bytes, list[Piece]]:
    if spec.codec is None:
        return archive.read("archive", spec.start, spec.num_bytes), []
    most = archive.entry("archive").num_bytes - spec.start
    data = archive.read("archive", spec.start, min(spec.num_bytes + MOST_BLOCK_BYTES, most))
    return decode_range(data, spec.start, spec.num_bytes)


def _line_ends(text: bytes) -> tuple[int, int]:
    """Behind the first line end and behind the last; 0 and 0 where there is none."""
    return text.find(b"\n") + 1, text.rfind(b"\n") + 1


class _Rows:
    """What is kept of the documents besides their texts, a column each."""

    def __init__(self) -> None:
        self.digests: list[bytes] = []
        self.sizes: list[int] = []
        self.characters: list[int] = []

    def add(self, document: Document) -> None:
        self.digests.append(document.digest)
        self.sizes.append(len(document.data))
        self.characters.append(document.num_characters)

    def write(self, path: Path) -> None:
        columns: list[Any] = [self.digests, self.sizes, self.characters]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, RANGE_ROWS, strict=True)]
        pq.write_table(pa.Table.from_arrays(arrays, schema=RANGE_ROWS), path, compression="zstd", use_dictionary=False)


def _sort_lines(work: Work, spec: RangeSpec, text: bytes) -> dict[str, object]:
    """Each whole line to its split or to the quarantine; returns the counts."""
    filters = filters_of(spec.min_characters, spec.max_characters, spec.character_ratios or (), None)
    splits, rows = {split: Shard() for split in SPLITS}, _Rows()
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    scratch, number, longest = work.scratch / "quarantine.jsonl", 0, 0
    with open_quarantine(scratch, 0) as quarantine:
        for number, line in enumerate(text.split(b"\n")[:-1] if text else [], 1):
            longest = max(longest, len(line))
            outcome = judge(Row(number, parse_line(line), line), spec.text_field, filters)
            if isinstance(outcome, Document):
                splits["validation" if is_validation(outcome.digest, spec.validation_fraction) else "train"].append(outcome)
                rows.add(outcome)
            elif isinstance(outcome, Dropped):
                counts[outcome.column] += 1
                reasons[outcome.reason or ""] += 1
            elif outcome is BLANK:
                counts["blank"] += 1
            else:
                assert isinstance(outcome, BadLine)
                counts["quarantined"] += 1
                quarantine.add(number, outcome)
    write_quarantine(scratch, work.folder / "quarantine.parquet")
    for split, shard in splits.items():
        write_shard(shard, work.folder / f"{split}.parquet", COMPRESSION)
    rows.write(work.folder / "rows.parquet")
    return {"num_lines": number, "counts": dict(counts), "reasons": dict(reasons), "longest_line": longest}


class RangeRows:
    """What is kept of a range's documents besides their texts."""

    def __init__(self, path: Path) -> None:
        table = pq.read_table(path, schema=RANGE_ROWS)
        self.digests: list[bytes] = table["digest"].to_pylist()
        self.sizes: list[int] = table["num_bytes"].to_pylist()
        self.characters: list[int] = table["num_characters"].to_pylist()
