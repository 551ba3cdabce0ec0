"""Archive to documents: content-defined shards, each document in the split that its digest says.

Reads   archive                              archive (any form that tasks.corpus.reader knows)
Writes  documents-shard  documents.parquet   DOCUMENTS: text
        documents        quarantine.parquet  QUARANTINE: line, reason, excerpt
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from tasks.corpus.boundaries import Document, Shard, Sharder, is_validation, read_document
from tasks.corpus.duplicates import Seen, open_seen
from tasks.corpus.reader import BLANK, EXCERPT_BYTES, BadLine, Row, read_rows
from tasks.errors import CorpusError
from tasks.schemas import DOCUMENTS, QUARANTINE, SPLITS
from tasks.store import Artifact, Built, Digest, ShardEntry, Spec, Work, shard_entry, stage

log = logging.getLogger(__name__)

# A reader holds one row group, decoded: 5 MB at 2.3 KB a document. Raise the shard's revision when you change it.
ROW_GROUP_DOCUMENTS = 2_000
QUARANTINE_ROWS = 10_000  # bad lines held in memory before they are written
EARLY_LINES = 1_000  # from here on too many bad lines fail the stage at once, not at the archive's end


class DocumentsSpec(Spec):
    """What is a document, and how documents are split and sharded."""

    text_field: str = Field("text", min_length=1, description="the field of each line, or column, that holds the text")
    max_documents: int | None = Field(None, ge=1, description="stop after so many documents; None: all")
    deduplicate: bool = Field(False, description="drop a document whose text, byte for byte, came before")
    min_characters: int | None = Field(None, ge=0, description="drop a document of fewer characters")
    max_characters: int | None = Field(None, ge=1, description="drop a document of more characters")
    validation_fraction: float = Field(0.005, ge=0, lt=1, description="the share of documents in the validation split")
    max_quarantined_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="fail when more than this share of the lines is bad; judged from line 1000 on, and at the end",
    )
    shard_bytes: int = Field(
        64 << 20, ge=1, description="the greatest size of a shard, in UTF-8 bytes of text, and 32 a document"
    )

    @model_validator(mode="after")
    def _lengths_leave_room(self) -> "DocumentsSpec":
        if self.min_characters is not None and self.max_characters is not None and self.min_characters > self.max_characters:
            raise ValueError(f"min_characters {self.min_characters} is greater than max_characters {self.max_characters}")
        return self


class DocumentsShardSpec(Spec):
    """A shard is the same wherever it stands in a corpus: its documents decide."""

    documents: Digest = Field(description="SHA-256 of the SHA-256 of each document's text, in order")


@dataclass
class Ledger:
    """Where every line went."""

    counts: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    first_bad: tuple[int, BadLine] | None = None

    @property
    def num_lines(self) -> int:
        return sum(self.counts.values())

    def stats(self) -> dict[str, Any]:
        names = ("documents", "quarantined", "filtered", "duplicates", "blank")
        histogram = {str(1 << digits >> 1): self.lengths[digits] for digits in sorted(self.lengths)}
        return {
            "num_lines": self.num_lines,
            **{f"num_{name}": self.counts[name] for name in names},
            "length_histogram": histogram,
        }

    def refuse_too_many_bad(self, path: Path, fraction: float) -> None:
        if self.first_bad is None or self.counts["quarantined"] <= fraction * self.num_lines:
            return
        line, bad = self.first_bad
        raise CorpusError(
            f"{path}: {self.counts['quarantined']} of the {self.num_lines} lines read are bad, more than the share {fraction:g}; "
            f"the first is line {line}, {bad.reason}: {bad.excerpt[:60]!r}; mend the archive, name another text_field, "
            "or raise max_quarantined_fraction"
        )


class Shards:
    """Takes documents into their split, and stores every shard that is full."""

    def __init__(self, work: Work, spec: DocumentsSpec) -> None:
        self.work, self.fraction = work, spec.validation_fraction
        self.sharders = {split: Sharder(spec.shard_bytes) for split in SPLITS}
        self.entries: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}

    def add(self, document: Document) -> None:
        split = "validation" if is_validation(document.digest, self.fraction) else "train"
        if shard := self.sharders[split].add(document):
            self._store(split, shard)

    def finish(self) -> tuple[ShardEntry, ...]:
        """Store what is left; the shards of all splits in order."""
        for split, sharder in self.sharders.items():
            for shard in sharder.finish():
                self._store(split, shard)
        return tuple(entry for split in SPLITS for entry in self.entries[split])

    def stats(self) -> dict[str, Any]:
        return {split: _sum_stats(entries) for split, entries in self.entries.items()}

    def _store(self, split: str, shard: Shard) -> None:
        entries = self.entries[split]
        entries.append(shard_entry(f"{split}/{len(entries):05d}", store_shard(self.work, shard)))


def _sum_stats(entries: list[ShardEntry]) -> dict[str, int]:
    sums = {name: sum(entry.stats[name] for entry in entries) for name in ("num_documents", "num_bytes", "num_characters")}
    return {**sums, "num_shards": len(entries)}


@stage("documents", revision=1)
def build_documents(work: Work, spec: DocumentsSpec, archive: Artifact) -> Built:
    """Stream the archive into shards; bad lines go to quarantine, and too many of them fail the stage."""
    path, ledger, shards = archive.file("archive"), Ledger(), Shards(work, spec)
    with (
        work.machine.progress("documents", path.stat().st_size, "B") as advance,
        open_quarantine(work.folder / "quarantine.parquet") as quarantine,
        open_seen(work.scratch) as seen,
    ):
        for row, outcome in judge_all(read_rows(path, advance, work.machine.num_workers, (spec.text_field,)), spec, seen):
            count(ledger, row, outcome)
            if isinstance(outcome, Document):
                shards.add(outcome)
            elif isinstance(outcome, BadLine) and outcome is not BLANK:
                quarantine.add(row.line, outcome)
                if ledger.num_lines >= EARLY_LINES:
                    ledger.refuse_too_many_bad(path, spec.max_quarantined_fraction)
    ledger.refuse_too_many_bad(path, spec.max_quarantined_fraction)
    entries = shards.finish()
    _refuse_nothing(path, ledger, shards.stats(), spec.validation_fraction)
    return Built(stats={**ledger.stats(), **shards.stats()}, shards=entries)


def _refuse_nothing(path: Path, ledger: Ledger, splits: dict[str, Any], fraction: float) -> None:
    if fraction and not splits["validation"]["num_documents"]:
        log.warning("%s: no document fell into the validation split; a greater validation_fraction would give it some", path)
    if splits["train"]["num_documents"]:
        return
    counts = ", ".join(f"{number} {name}" for name, number in ledger.counts.items()) or "none"
    raise CorpusError(
        f"{path}: no document for the train split ({ledger.num_lines} lines: {counts}); "
        "name another archive, or change text_field, the length limits or validation_fraction"
    )


# What became of a row: a document, a bad line (BLANK among them), or why a document was dropped.
Outcome = Document | BadLine | str


def judge_all(batches: Iterator[list[Row]], spec: DocumentsSpec, seen: Seen) -> Iterator[tuple[Row, Outcome]]:
    """What becomes of each row, up to the last document that the spec asks for."""
    num_documents = 0
    for batch in batches:
        outcomes = [judge(row, spec) for row in batch]
        if spec.deduplicate:
            drop_duplicates(outcomes, seen)
        for row, outcome in zip(batch, outcomes, strict=True):
            yield row, outcome
            num_documents += isinstance(outcome, Document)
            if num_documents == spec.max_documents:
                return


def drop_duplicates(outcomes: list[Outcome], seen: Seen) -> None:
    """Leave of equal documents the first."""
    documents = [(place, outcome.digest) for place, outcome in enumerate(outcomes) if isinstance(outcome, Document)]
    firsts = seen.firsts([digest for _, digest in documents])
    for (place, _), is_first in zip(documents, firsts, strict=True):
        if not is_first:
            outcomes[place] = "duplicates"


def judge(row: Row, spec: DocumentsSpec) -> Outcome:
    """What becomes of one row, looked at alone."""
    if isinstance(row.value, BadLine):
        return row.value
    if not isinstance(row.value, dict):
        return _bad(row, "not an object")
    text = row.value.get(spec.text_field)
    if not isinstance(text, str):
        reason = "is not a string" if spec.text_field in row.value and text is not None else "is missing"
        return _bad(row, f"the field {spec.text_field!r} {reason}")
    if not (spec.min_characters or 0) <= len(text) <= (len(text) if spec.max_characters is None else spec.max_characters):
        return "filtered"
    try:
        return read_document(text)
    except UnicodeEncodeError as error:
        return _bad(row, f"lone surrogate at character {error.start}")


def _bad(row: Row, reason: str) -> BadLine:
    return BadLine(reason, (row.raw or orjson.dumps(row.value, default=repr))[:EXCERPT_BYTES])


def count(ledger: Ledger, row: Row, outcome: Outcome) -> None:
    """Enter a row in the ledger."""
    if isinstance(outcome, Document):
        ledger.counts["documents"] += 1
        ledger.lengths[outcome.num_characters.bit_length()] += 1
    elif isinstance(outcome, str):
        ledger.counts[outcome] += 1
    elif outcome is BLANK:
        ledger.counts["blank"] += 1
    else:
        ledger.counts["quarantined"] += 1
        ledger.first_bad = ledger.first_bad or (row.line, outcome)


def store_shard(work: Work, shard: Shard) -> Artifact:
    """The artifact of a shard, written only where the store does not hold it already."""

    @stage("documents-shard", revision=2)
    def build_documents_shard(work: Work, spec: DocumentsShardSpec) -> Built:
        write_shard(shard, work.folder / "documents.parquet")
        return Built(stats=shard.stats)

    return build_documents_shard(work.store, work.machine, DocumentsShardSpec(documents=shard.identity))


def write_shard(shard: Shard, path: Path) -> None:
    """Write a shard's documents as DOCUMENTS."""
    offsets = np.concatenate(([0], np.cumsum(np.array(shard.sizes, np.int64))))
    texts = pa.LargeStringArray.from_buffers(len(shard), pa.py_buffer(offsets), pa.py_buffer(shard.data))
    table = pa.Table.from_arrays([texts], schema=DOCUMENTS)
    # No dictionary and no statistics: texts do not repeat, and their least and greatest tell nothing.
    pq.write_table(
        table, path, row_group_size=ROW_GROUP_DOCUMENTS, compression="zstd", use_dictionary=False, write_statistics=False
    )


class Quarantine:
    """Writes bad lines, a batch at a time."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self.writer = writer
        self.rows: list[dict[str, Any]] = []

    def add(self, line: int, bad: BadLine) -> None:
        self.rows.append({"line": line, "reason": bad.reason, "excerpt": bad.excerpt})
        if len(self.rows) == QUARANTINE_ROWS:
            self.flush()

    def flush(self) -> None:
        self.writer.write_table(pa.Table.from_pylist(self.rows, schema=QUARANTINE))
        self.rows = []


@contextmanager
def open_quarantine(path: Path) -> Iterator[Quarantine]:
    """A QUARANTINE table that is being written."""
    with pq.ParquetWriter(path, QUARANTINE, compression="zstd") as writer:
        quarantine = Quarantine(writer)
        yield quarantine
        quarantine.flush()
