"""Archive to documents: content-defined shards, each document in the split that its digest says.

Reads   archive                              archive (any form that tasks.corpus.reader knows)
Writes  documents-shard  documents.parquet   DOCUMENTS: text
        documents        quarantine.parquet  QUARANTINE: line, reason, excerpt
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from tasks.corpus.boundaries import DIGEST_BYTES, Document
from tasks.corpus.bzip2 import RangeError
from tasks.corpus.document_shards import Shards, open_shards, read_texts
from tasks.corpus.duplicates import Seen, open_seen
from tasks.corpus.journal import Journal
from tasks.corpus.judge import DUPLICATE, NEAR_DUPLICATE, Ledger, Outcome, drop, judge
from tasks.corpus.many_readers import forget_ranges, plan_ranges, read_ranges, write_shards
from tasks.corpus.near_duplicates import KEPT_LOG, NearDuplicates, NearSeen, open_near_seen
from tasks.corpus.quality import CharacterRatio, check_function_name, digest_function, filters_of
from tasks.corpus.quarantine import Quarantine, open_quarantine, write_quarantine
from tasks.corpus.ranges import RangeSpec
from tasks.corpus.reader import BLANK, BadLine, Batch, read_batches
from tasks.corpus.scratch_log import ScratchLog, open_log
from tasks.corpus.shards import load_shard, sum_stats
from tasks.corpus.stitching import Cutter, Stitcher, split_of
from tasks.errors import CorpusError
from tasks.machine import Machine
from tasks.schemas import SPLITS
from tasks.store import Artifact, ArtifactStore, Built, ShardEntry, Spec, Work, stage, unkeyed

log = logging.getLogger(__name__)

DROPPED_LOG = "near-dropped"  # the digests of what was nearly a document before


class DocumentsSpec(Spec):
    """What is a document, which are wanted, and how they are split and sharded."""

    text_field: str = Field("text", min_length=1, description="the field of each line, or column, that holds the text")
    max_documents: int | None = Field(None, ge=1, description="stop after so many documents; None: all")
    deduplicate: bool = Field(False, description="drop a document whose text, byte for byte, came before")
    near_duplicates: NearDuplicates | None = Field(None, description="drop a document that is nearly one that came before")
    min_characters: int | None = Field(None, ge=0, description="drop a document of fewer characters")
    max_characters: int | None = Field(None, ge=1, description="drop a document of more characters")
    character_ratios: tuple[CharacterRatio, ...] | None = Field(
        None, description="drop a document by the share of a class of characters"
    )
    filter: str | None = Field(
        None,
        description="your own module:function, which takes a text and returns whether to keep it; the bytes of your files count",
    )
    validation_fraction: float = Field(0.005, ge=0, lt=1, description="the share of documents in the validation split")
    max_quarantined_fraction: float = unkeyed(
        0.01,
        ge=0,
        le=1,
        description="fail when more than this share of the lines is bad; judged from line 1000 on, and at the end",
    )
    shard_bytes: int = Field(
        64 << 20, ge=1, description="the greatest size of a shard, in UTF-8 bytes of text, and 32 a document"
    )

    @field_validator("filter")
    @classmethod
    def _is_function(cls, value: str | None) -> str | None:
        return None if value is None else check_function_name(value)

    @model_validator(mode="after")
    def _lengths_leave_room(self) -> "DocumentsSpec":
        if self.min_characters is not None and self.max_characters is not None and self.min_characters > self.max_characters:
            raise ValueError(f"min_characters {self.min_characters} is greater than max_characters {self.max_characters}")
        return self


def identify_filter(spec: DocumentsSpec, store: ArtifactStore, machine: Machine) -> str | None:
    """The bytes of the file that holds the user's own filter."""
    return None if spec.filter is None else digest_function(spec.filter)


@stage("documents", revision=2, identify_source=identify_filter)
def build_documents(work: Work, spec: DocumentsSpec, archive: Artifact) -> Built:
    """Stream the archive into shards; bad lines go to quarantine, and too many of them fail the stage.

    A build that was killed goes on behind the last shards that it stored.
    """
    return _by_many_readers(work, spec, archive) or _by_one_reader(work, spec, archive)


def _by_one_reader(work: Work, spec: DocumentsSpec, archive: Artifact) -> Built:
    path, ledger, journal = archive.file("archive"), Ledger(), Journal(work.scratch)
    scratch = work.scratch / "quarantine.jsonl"
    with ExitStack() as stack:
        advance = stack.enter_context(work.machine.progress("documents", path.stat().st_size, "B"))
        shards = stack.enter_context(open_shards(work, spec.shard_bytes, spec.validation_fraction))
        start, num_quarantine_bytes = journal.restore(work.store, ledger, shards, scratch)
        quarantine = stack.enter_context(open_quarantine(scratch, num_quarantine_bytes))
        droppers = stack.enter_context(open_droppers(work, spec, shards, journal.logs))
        filters = filters_of(spec.min_characters, spec.max_characters, spec.character_ratios or (), spec.filter)
        sorting = Sorting(path, spec, ledger, shards, quarantine)
        for batch in read_batches(path, advance, work.machine.num_workers, (spec.text_field,), start):
            outcomes = [judge(row, spec.text_field, filters) for row in batch.rows]
            droppers.drop(outcomes)
            sorting.take(batch, outcomes)
            if sorting.is_full:
                break
            if batch.end and journal.is_due(shards):
                journal.write(batch.end(), ledger, shards, quarantine.num_bytes(), droppers.settle())
        entries = shards.finish()
    return _finished(work, spec, path, ledger, entries)


def _finished(work: Work, spec: DocumentsSpec, path: Path, ledger: Ledger, entries: tuple[ShardEntry, ...]) -> Built:
    """The artifact of what was read, whoever read it."""
    ledger.refuse_too_many_bad(path, spec.max_quarantined_fraction)
    write_quarantine(work.scratch / "quarantine.jsonl", work.folder / "quarantine.parquet")
    names = ("num_documents", "num_bytes", "num_characters")
    splits = {split: sum_stats([entry for entry in entries if entry.split == split], *names) for split in SPLITS}
    _refuse_nothing(path, ledger, splits, spec.validation_fraction)
    return Built(stats={**ledger.stats(), **splits}, shards=entries)


def _by_many_readers(work: Work, spec: DocumentsSpec, archive: Artifact) -> Built | None:
    """By all worker processes, here or of a cluster; None without, or where the documents' order decides more than they know."""
    if not work.machine.has_processes or spec.near_duplicates or spec.max_documents or spec.filter:
        return None
    same = ("text_field", "min_characters", "max_characters", "character_ratios", "validation_fraction")
    plan = plan_ranges(archive, work.scratch, RangeSpec(start=0, num_bytes=1, **{name: getattr(spec, name) for name in same}))
    if plan is None:
        return None
    ledger, path = Ledger(), archive.folder / "archive"
    filters = filters_of(spec.min_characters, spec.max_characters, spec.character_ratios or (), None)
    with ExitStack() as stack:
        quarantine = stack.enter_context(open_quarantine(work.scratch / "quarantine.jsonl", 0))
        seen = stack.enter_context(open_seen(work.scratch)) if spec.deduplicate else None
        stitcher = Stitcher(
            {split: Cutter(split, spec.shard_bytes) for split in SPLITS},
            ledger,
            quarantine,
            judge_line=lambda row: judge(row, spec.text_field, filters),
            split_of=lambda digest: split_of(digest, spec.validation_fraction),
            check_bad=lambda line: ledger.refuse_early(path, spec.max_quarantined_fraction, line),
            firsts=seen.firsts if seen else None,
        )
        try:
            read_ranges(work, plan, archive, stitcher)
        except RangeError as error:
            log.warning("%s: read in ranges, %s; one reader begins anew", archive.short, error)
            forget_ranges(work)
            return None
    return _finished(work, spec, path, ledger, write_shards(work, stitcher))


@dataclass
class Sorting:
    """Puts each row where it belongs, up to the last document that the recipe asks for."""

    path: Path
    spec: DocumentsSpec
    ledger: Ledger
    shards: Shards
    quarantine: Quarantine

    @property
    def is_full(self) -> bool:
        return self.ledger.counts["documents"] == self.spec.max_documents

    def take(self, batch: Batch, outcomes: list[Outcome]) -> None:
        for row, outcome in zip(batch.rows, outcomes, strict=True):
            self.ledger.enter(row, outcome)
            if isinstance(outcome, Document):
                self.shards.add(outcome)
                if self.is_full:
                    return
            elif isinstance(outcome, BadLine) and outcome is not BLANK:
                self.quarantine.add(row.line, outcome)
                self.ledger.refuse_early(self.path, self.spec.max_quarantined_fraction, self.ledger.num_lines)


@dataclass
class Droppers:
    """Puts in the place of documents that came before why they are dropped. near: with the log of what it dropped."""

    seen: Seen | None = None
    near: tuple[NearSeen, ScratchLog] | None = None

    def drop(self, outcomes: list[Outcome]) -> None:
        if seen := self.seen:
            drop(outcomes, DUPLICATE, lambda some: seen.firsts([one.digest for one in some]))
        if self.near:
            drop(outcomes, NEAR_DUPLICATE, self._are_unlike)

    def _are_unlike(self, documents: list[Document]) -> list[bool]:
        assert self.near
        near, dropped = self.near
        unlike = near.firsts([one.data.decode() for one in documents])
        dropped.append(b"".join(one.digest for one, is_unlike in zip(documents, unlike, strict=True) if not is_unlike))
        return unlike

    def settle(self) -> dict[str, int]:
        """Put on disk what no shard tells; the logs and their bytes."""
        if not self.near:
            return {}
        near, dropped = self.near
        return {KEPT_LOG: near.settle(), DROPPED_LOG: dropped.settle()}


@contextmanager
def open_droppers(work: Work, spec: DocumentsSpec, shards: Shards, logs: Mapping[str, int]) -> Iterator[Droppers]:
    """What drops the duplicates that the recipe does not want; it remembers what ``shards`` and the logs already have."""
    droppers = Droppers()
    with ExitStack() as stack:
        if spec.near_duplicates:
            near = stack.enter_context(open_near_seen(work.scratch, spec.near_duplicates, logs.get(KEPT_LOG, 0)))
            log = stack.enter_context(open_log(work.scratch / DROPPED_LOG, DIGEST_BYTES, logs.get(DROPPED_LOG, 0)))
            droppers.near = (near, log)
        if spec.deduplicate:
            droppers.seen = stack.enter_context(open_seen(work.scratch))
            _remember(droppers.seen, work.store, shards)
            if droppers.near:  # a copy of what was nearly another is a copy
                for digests in droppers.near[1].all():
                    droppers.seen.firsts(_cut(digests))
        yield droppers


def _remember(seen: Seen, store: ArtifactStore, shards: Shards) -> None:
    """Enter the documents of a build that goes on."""
    for entry in chain.from_iterable(shards.entries.values()):
        for texts in read_texts(load_shard(store, entry).file("documents.parquet")):
            seen.firsts([hashlib.sha256(text.encode()).digest() for text in texts])
    for sharder in shards.sharders.values():
        seen.firsts(_cut(bytes(sharder.pending.digests)))


def _cut(digests: bytes) -> list[bytes]:
    return [digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)]


def _refuse_nothing(path: Path, ledger: Ledger, splits: dict[str, Any], fraction: float) -> None:
    if fraction and not splits["validation"]["num_documents"]:
        log.warning("%s: no document fell into the validation split; a greater validation_fraction would give it some", path)
    if splits["train"]["num_documents"]:
        return
    counts = ", ".join(f"{number} {name}" for name, number in ledger.counts.items()) or "none"
    raise CorpusError(
        f"{path}: no document for the train split ({ledger.num_lines} lines: {counts}); "
        "name another archive, or change text_field, the filters or validation_fraction"
    )
