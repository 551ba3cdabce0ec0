import bz2
import gzip
import hashlib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from tasks.corpus import document_shards, journal, quarantine, reader
from tasks.corpus import documents as stage_module
from tasks.corpus.boundaries import Shard
from tasks.corpus.document_shards import write_shard
from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.corpus.near_duplicates import NearDuplicates
from tasks.corpus.quality import CharacterRatio
from tasks.errors import CorpusError
from tasks.machine import Machine
from tasks.schemas import DOCUMENTS, QUARANTINE
from tasks.store import Artifact, ArtifactStore

from .archives import tar_of_one
from .conftest import json_lines, store_archive

TEXTS = [f"第{i}篇：海内存知己，天涯若比邻。{'无为在歧路' * (i % 7)}" for i in range(400)]


def build(store: ArtifactStore, data: bytes, machine: Machine | None = None, **fields: Any) -> Artifact:
    return build_documents(store, machine or Machine(), DocumentsSpec(**fields), archive=store_archive(store, data))


def texts_in(artifact: Artifact, split: str) -> list[str]:
    paths = [artifact.shard_file(entry, "documents.parquet") for entry in artifact.shards(split)]
    return [text for path in paths for text in pq.read_table(path)["text"].to_pylist()]


def quarantine_of(artifact: Artifact) -> list[tuple[int, str, bytes]]:
    rows = pq.read_table(artifact.file("quarantine.parquet")).to_pylist()
    return [(row["line"], row["reason"], row["excerpt"]) for row in rows]


def test_every_document_is_in_one_split_in_order(store: ArtifactStore) -> None:
    artifact = build(store, json_lines(TEXTS), validation_fraction=0.1, shard_bytes=4_000)
    train, validation = texts_in(artifact, "train"), texts_in(artifact, "validation")
    assert sorted(train + validation) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert 20 < len(validation) < 60
    assert [entry.name for entry in artifact.shards("train")][:2] == ["train/00000", "train/00001"]


def test_equal_texts_are_never_on_both_sides_of_the_split(store: ArtifactStore) -> None:
    artifact = build(store, json_lines(TEXTS * 3), validation_fraction=0.3)
    assert not set(texts_in(artifact, "train")) & set(texts_in(artifact, "validation"))


def test_a_shard_is_one_table_of_texts(documents_of: Callable[..., Artifact]) -> None:
    artifact = documents_of(["春眠不觉晓", "", "b"])
    (entry,) = artifact.shards()
    table = pq.read_table(artifact.shard_file(entry, "documents.parquet"))
    assert table.schema.equals(DOCUMENTS)
    assert table["text"].to_pylist() == ["春眠不觉晓", "", "b"]
    assert entry.stats == {"num_documents": 3, "num_bytes": 16, "num_characters": 6}


def test_every_line_is_in_the_ledger(store: ArtifactStore) -> None:
    data = json_lines(["甲乙丙丁", "a", "甲乙丙丁", "bbbb"]) + b"\n \nbroken\n" + json_lines(["c" * 9])
    artifact = build(
        store, data, deduplicate=True, min_characters=2, max_characters=8, max_quarantined_fraction=1, validation_fraction=0
    )
    stats = artifact.stats
    assert stats["num_lines"] == 8
    assert {name: stats[f"num_{name}"] for name in ("documents", "duplicates", "filtered", "blank", "quarantined")} == {
        "documents": 2, "duplicates": 1, "filtered": 2, "blank": 2, "quarantined": 1,
    }  # fmt: skip
    assert stats["train"] == {"num_documents": 2, "num_bytes": 16, "num_characters": 8, "num_shards": 1}
    assert stats["validation"] == {"num_documents": 0, "num_bytes": 0, "num_characters": 0, "num_shards": 0}
    assert stats["length_histogram"] == {"4": 2}


def test_lengths_are_counted_by_powers_of_two(documents_of: Callable[..., Artifact]) -> None:
    texts = ["", "a", "bb", "ccc", "dddd", "e" * 1023, "f" * 1024]
    assert documents_of(texts).stats["length_histogram"] == {"0": 1, "1": 1, "2": 2, "4": 1, "512": 1, "1024": 1}


BAD_LINES = [
    (b"nonsense", "not JSON"),
    (b"[1, 2]", "not an object"),
    (b"null", "not an object"),
    (b'{"txt": "a"}', "the field 'text' is missing"),
    (b'{"text": null}', "the field 'text' is missing"),
    (b'{"text": 7}', "the field 'text' is not a string"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (rb'{"text": "\udc00"}', "not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_goes_to_quarantine_with_its_number_and_reason(store: ArtifactStore, line: bytes, reason: str) -> None:
    artifact = build(store, json_lines(["a", "b"]) + line + b"\n", max_quarantined_fraction=0.5, validation_fraction=0)
    ((number, told, excerpt),) = quarantine_of(artifact)
    assert (number, excerpt) == (3, line)
    assert told.startswith(reason)
    assert texts_in(artifact, "train") == ["a", "b"]


def test_the_quarantine_is_a_table_even_when_nothing_is_bad(documents_of: Callable[..., Artifact]) -> None:
    assert pq.read_schema(documents_of(["a"]).file("quarantine.parquet")).equals(QUARANTINE)


def test_more_bad_lines_than_one_batch_are_all_kept(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "ROWS", 3)
    artifact = build(store, b"bad\n" * 8 + json_lines(["a"]), max_quarantined_fraction=1, validation_fraction=0)
    assert [line for line, _, _ in quarantine_of(artifact)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_too_many_bad_lines_fail_the_stage_and_the_first_is_told(store: ArtifactStore) -> None:
    with pytest.raises(
        CorpusError, match=r"2 of the 4 lines read are bad, more than the share 0\.25; the first is line 2, not JSON"
    ):
        build(store, json_lines(["a"]) + b"one\ntwo\n" + json_lines(["b"]), max_quarantined_fraction=0.25)


def test_too_many_bad_lines_fail_the_stage_before_the_archive_ends(store: ArtifactStore) -> None:
    data = json_lines(["a"] * 990) + b"bad\n" * 100 + json_lines(["b"] * 100_000)
    with pytest.raises(CorpusError, match="11 of the 1001 lines read are bad"):
        build(store, data)


def test_a_few_bad_lines_at_the_start_do_not_fail_a_good_archive(store: ArtifactStore) -> None:
    artifact = build(store, b"bad\n" * 5 + json_lines(["a"] * 995))
    assert artifact.stats["num_quarantined"] == 5


@pytest.mark.parametrize(
    ("data", "fields"),
    [(b"\n\n", {}), (json_lines(["a"]), {"min_characters": 2}), (b"bad\n", {"max_quarantined_fraction": 1.0})],
)
def test_a_corpus_without_a_document_is_refused(store: ArtifactStore, data: bytes, fields: dict[str, Any]) -> None:
    with pytest.raises(CorpusError, match=r"no document for the train split \(\d lines: "):
        build(store, data, **fields)


def test_an_empty_validation_split_is_warned_of(store: ArtifactStore, caplog: pytest.LogCaptureFixture) -> None:
    artifact = build(store, json_lines(["a"]), validation_fraction=0.001)
    assert artifact.stats["validation"]["num_documents"] == 0
    assert "no document fell into the validation split" in caplog.text


def test_the_first_of_equal_documents_wins(store: ArtifactStore) -> None:
    artifact = build(store, json_lines(["a", "b", "a", "c", "b"]), deduplicate=True, validation_fraction=0)
    assert texts_in(artifact, "train") == ["a", "b", "c"]


def test_equal_documents_far_apart_are_found(store: ArtifactStore) -> None:
    texts = [f"document {i} {'x' * 100}" for i in range(30_000)]  # more than one batch of the reader
    artifact = build(store, json_lines([*texts, *reversed(texts)]), deduplicate=True)
    assert (artifact.stats["num_documents"], artifact.stats["num_duplicates"]) == (30_000, 30_000)


def test_the_first_documents_are_taken_and_nothing_behind_them_is_read(store: ArtifactStore) -> None:
    data = json_lines(["a", "b", "a"]) + b"bad\n" + json_lines(["c", "d"]) + b"bad\n" * 50
    artifact = build(store, data, max_documents=3, deduplicate=True, validation_fraction=0, max_quarantined_fraction=0.2)
    assert texts_in(artifact, "train") == ["a", "b", "c"]
    assert artifact.stats["num_lines"] == 5


def test_parquet_gives_documents_by_its_text_column(store: ArtifactStore, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2, 3], "body": ["甲", None, "乙"]}), tmp_path / "corpus.parquet")
    data = (tmp_path / "corpus.parquet").read_bytes()
    artifact = build(store, data, text_field="body", max_quarantined_fraction=0.5, validation_fraction=0)
    assert texts_in(artifact, "train") == ["甲", "乙"]
    assert quarantine_of(artifact) == [(2, "the field 'body' is missing", b'{"body":null}')]
    with pytest.raises(CorpusError, match="no column text; it has id, body"):
        build(store, data)


def test_a_text_column_of_numbers_is_quarantined(store: ArtifactStore, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [b"raw"]}), tmp_path / "corpus.parquet")
    with pytest.raises(CorpusError, match="the field 'text' is not a string"):
        build(store, (tmp_path / "corpus.parquet").read_bytes())


def test_a_grown_corpus_finds_the_shards_that_did_not_change(store: ArtifactStore) -> None:
    before = build(store, json_lines(TEXTS), shard_bytes=4_000)
    written = {path: path.stat().st_mtime_ns for path in store.root.glob("documents-shard/*/documents.parquet")}
    after = build(store, json_lines([*TEXTS, "new at the end"]), shard_bytes=4_000)
    old, new = [{entry.key for entry in artifact.shards()} for artifact in (before, after)]
    assert len(new - old) <= 2 < len(old)
    assert all(path.stat().st_mtime_ns == written[path] for path in written)


def test_a_killed_run_keeps_its_shards_and_ends_the_same(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"shard_bytes": 4_000, "deduplicate": True}
    expected = build(ArtifactStore(store.root.parent / "other"), json_lines(TEXTS * 2), **fields)
    written: list[Path] = []

    def write_two_and_die(shard: Shard, path: Path) -> None:
        if len(written) == 2:
            path.write_bytes(b"torn")
            raise KeyboardInterrupt
        written.append(path)
        write_shard(shard, path)

    monkeypatch.setattr(document_shards, "write_shard", write_two_and_die)
    with pytest.raises(KeyboardInterrupt):
        build(store, json_lines(TEXTS * 2), **fields)
    monkeypatch.undo()
    kept = {path: path.stat().st_mtime_ns for path in store.root.glob("documents-shard/*/documents.parquet")}
    found = build(store, json_lines(TEXTS * 2), **fields)
    assert (found.content, found.stats) == (expected.content, expected.stats)
    assert len(kept) == 2
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert not list(store.root.glob(".staging/*/*"))


def dying(path: Path, times: list[int], after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the build die as it stores shard number ``after``; ``times`` is told the line that each build begins at."""

    def write_some_and_die(shard: Shard, target: Path) -> None:
        if len(list(path.glob("documents-shard/*/manifest.json"))) >= after:
            raise KeyboardInterrupt
        write_shard(shard, target)

    def read_and_tell(*args: Any) -> Iterator[reader.Batch]:
        times.append(args[-1].line)
        return reader.read_batches(*args)

    monkeypatch.setattr(document_shards, "write_shard", write_some_and_die)
    monkeypatch.setattr(stage_module, "read_batches", read_and_tell)


def bzip2(data: bytes) -> bytes:
    return bz2.compress(data, 1)


@pytest.mark.parametrize(
    ("compress", "wrap", "deduplicate"),
    [
        *product([bytes, bzip2, gzip.compress, zstandard.compress], [bytes, tar_of_one], [False]),
        (bzip2, tar_of_one, True),  # what was seen is made anew from the shards, whatever they were read from
    ],
)
def test_a_killed_build_reads_on_behind_its_last_shards(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes], wrap: Callable[[bytes], bytes],
    deduplicate: bool,
) -> None:  # fmt: skip
    random = Random(5)
    texts = [f"{i} " + "".join(chr(random.randint(0x4E00, 0x9FA5)) for _ in range(400)) for i in range(1_500)]
    lines = [json_lines([text]) for text in [*texts, *texts[::7]]]
    lines[40], lines[900] = b"bad\n", b"\n"
    data, fields = compress(wrap(b"".join(lines))), {"shard_bytes": 150_000, "deduplicate": deduplicate}
    expected = build(ArtifactStore(store.root.parent / "other"), data, **fields)
    monkeypatch.setattr(journal, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 50_000)
    starts: list[int] = []
    for after in (4, 9):
        dying(store.root, starts, after, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            build(store, data, **fields)
    dying(store.root, starts, 1_000, monkeypatch)
    found = build(store, data, **fields)
    assert found.content == expected.content
    assert {**found.stats, "length_histogram": None} == {**expected.stats, "length_histogram": None}
    assert found.stats["length_histogram"] == expected.stats["length_histogram"]
    assert quarantine_of(found) == quarantine_of(expected)
    assert 1 == starts[0] < starts[1] < starts[2]


def test_a_journal_whose_shards_are_lost_is_passed_over(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 500)
    expected = build(ArtifactStore(store.root.parent / "other"), json_lines(TEXTS), shard_bytes=4_000)
    starts: list[int] = []
    dying(store.root, starts, 3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        build(store, json_lines(TEXTS), shard_bytes=4_000)
    next(store.root.glob("documents-shard/*/documents.parquet")).unlink()
    dying(store.root, starts, 1_000, monkeypatch)
    assert build(store, json_lines(TEXTS), shard_bytes=4_000).content == expected.content
    assert starts == [1, 1]


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_journal_whose_quarantine_is_lost_is_passed_over(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], object]
) -> None:
    monkeypatch.setattr(journal, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 500)
    data, fields = b"bad\n" + json_lines(TEXTS), {"shard_bytes": 4_000, "max_quarantined_fraction": 1.0}
    expected = build(ArtifactStore(store.root.parent / "other"), data, **fields)
    starts: list[int] = []
    dying(store.root, starts, 3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        build(store, data, **fields)
    spoil(next(store.root.glob(".staging/documents/*/.scratch/quarantine.jsonl")))
    dying(store.root, starts, 1_000, monkeypatch)
    assert build(store, data, **fields).content == expected.content
    assert starts == [1, 1]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_neither_compression_nor_workers_change_the_content(store: ArtifactStore, num_workers: int) -> None:
    expected = build(store, json_lines(TEXTS), shard_bytes=8_000).manifest
    data, other = bz2.compress(json_lines(TEXTS)), ArtifactStore(store.root.parent / "other")
    found = build(other, data, Machine(num_workers=num_workers), shard_bytes=8_000).manifest
    assert (found.content, found.stats) == (expected.content, expected.stats)


def test_golden_texts(store: ArtifactStore) -> None:
    """A changed golden means that the stage's revision must rise."""
    artifact = build(store, json_lines(TEXTS), validation_fraction=0.1, shard_bytes=4_000)
    columns = [(entry.name, texts_in_shard(artifact, entry)) for entry in artifact.shards()]
    assert hashlib.sha256(orjson.dumps(columns)).hexdigest()[:16] == "55719b359940cfe3"


def texts_in_shard(artifact: Artifact, entry: Any) -> list[str]:
    texts: list[str] = pq.read_table(artifact.shard_file(entry, "documents.parquet"))["text"].to_pylist()
    return texts


EVERY_KEYED_FIELD: dict[str, Any] = {
    "text_field": "body",
    "max_documents": 10,
    "deduplicate": True,
    "near_duplicates": NearDuplicates(),
    "min_characters": 1,
    "max_characters": 10,
    "character_ratios": (CharacterRatio(characters="cjk", least=0.5),),
    "filter": "wanted:keep",
    "validation_fraction": 0.1,
    "shard_bytes": 1_000,
}


def test_every_field_that_can_change_a_byte_changes_the_identity() -> None:
    assert set(EVERY_KEYED_FIELD) == set(DocumentsSpec.model_fields) - {"max_quarantined_fraction"}
    identities = [DocumentsSpec(**{name: value}).identity() for name, value in EVERY_KEYED_FIELD.items()]
    assert DocumentsSpec().identity() not in identities
    assert DocumentsSpec(max_quarantined_fraction=0.5).identity() == DocumentsSpec().identity()


@pytest.mark.parametrize(
    "fields",
    [{"min_characters": 5, "max_characters": 4}, {"validation_fraction": 1.0}, {"validation_fraction": -0.1}, {"text_field": ""},
     {"max_documents": 0}, {"max_quarantined_fraction": 1.5}, {"filter": "keep"}, {"near_duplicates": {"num_bands": 7}},
     {"character_ratios": [{"characters": "cjk", "least": 0.5, "most": 0.4}]}, {"shard_bytes": 0}, {"unknown": 1}],
)  # fmt: skip
def test_a_spec_that_cannot_be_meant_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DocumentsSpec(**fields)
