import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.corpus import encoder, tokens
from tasks.corpus.encoder import Encoded
from tasks.corpus.tokenizer import TokenizerSpec, build_tokenizer
from tasks.corpus.tokens import TokensSpec, build_tokens, close_documents, tokenize_shard
from tasks.errors import CorpusError
from tasks.machine import Machine
from tasks.schemas import DOCUMENTS, TOKENS
from tasks.store import Artifact, ArtifactStore

from .conftest import PRACTICE

END = 256


def encode_bytes(texts: Sequence[str], first: int) -> Encoded:
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return Encoded(np.frombuffer(b"".join(encoded), np.uint8).astype(np.int32), offsets)


def write_documents(path: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"text": texts}, schema=DOCUMENTS), path)
    return path


def rows_of(path: Path) -> list[list[int]]:
    rows: list[list[int]] = pa.ipc.open_file(path).read_all()["input_ids"].to_pylist()
    return rows


def test_every_document_is_one_row_closed_by_the_end_id(tmp_path: Path) -> None:
    source, target = write_documents(tmp_path / "documents.parquet", ["好", "", "ab"]), tmp_path / "tokens.arrow"
    assert tokenize_shard(source, target, encode_bytes, END) == 8
    assert rows_of(target) == [[0xE5, 0xA5, 0xBD, END], [END], [0x61, 0x62, END]]
    assert pa.ipc.open_file(target).schema.equals(TOKENS)


@pytest.mark.parametrize("batch_documents", [1, 2, 3, 1_000])
def test_batches_do_not_change_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_documents: int) -> None:
    monkeypatch.setattr(tokens, "BATCH_DOCUMENTS", batch_documents)
    source = write_documents(tmp_path / "documents.parquet", ["a", "bc", "", "d", "e"])
    tokenize_shard(source, tmp_path / "tokens.arrow", encode_bytes, END)
    assert rows_of(tmp_path / "tokens.arrow") == [[97, END], [98, 99, END], [END], [100, END], [101, END]]


@pytest.mark.parametrize(("most", "batches"), [(3, [["a", "bb"], ["cccc"], ["d"]]), (100, [["a", "bb", "cccc", "d"]])])
def test_long_texts_are_encoded_fewer_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, batches: list[list[str]]
) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", most)
    source = write_documents(tmp_path / "documents.parquet", ["a", "bb", "cccc", "d"])
    with pq.ParquetFile(source) as table:
        assert list(tokens.read_batches(table)) == batches


def test_a_shard_that_fails_half_way_does_not_exist(tmp_path: Path) -> None:
    def encode_and_die(texts: Sequence[str], first: int) -> Encoded:
        raise RuntimeError("killed")

    source, target = write_documents(tmp_path / "documents.parquet", ["a"]), tmp_path / "tokens.arrow"
    with pytest.raises(RuntimeError, match="killed"):
        tokenize_shard(source, target, encode_and_die, END)
    assert not target.exists()


def test_no_document_closes_to_nothing() -> None:
    closed = close_documents(Encoded(np.empty(0, np.int32), np.zeros(1, np.int64)), END)
    assert (closed.ids.tolist(), closed.offsets.tolist()) == ([], [0])


def build(store: ArtifactStore, documents: Artifact, tokenizer: Artifact, machine: Machine | None = None) -> Artifact:
    return build_tokens(store, machine or Machine(), TokensSpec(), documents=documents, tokenizer=tokenizer)


def all_rows(artifact: Artifact) -> list[list[int]]:
    return [row for entry in artifact.shards() for row in rows_of(artifact.shard_file(entry, "tokens.arrow"))]


def test_every_documents_shard_has_its_tokens_shard(
    store: ArtifactStore, documents_of: Callable[..., Artifact], trained: Artifact
) -> None:
    documents = documents_of(PRACTICE, shard_bytes=2_000, validation_fraction=0.2)
    artifact = build(store, documents, trained)
    assert [entry.name for entry in artifact.shards()] == [entry.name for entry in documents.shards()]
    assert {entry.kind for entry in artifact.shards()} == {"tokens-shard"}
    for split in ("train", "validation"):
        counts = artifact.stats[split]
        assert counts["num_tokens"] == sum(
            len(row) for entry in artifact.shards(split) for row in rows_of(artifact.shard_file(entry, "tokens.arrow"))
        )
        assert {k: counts[k] for k in ("num_documents", "num_bytes", "num_shards")} == {
            k: documents.stats[split][k] for k in ("num_documents", "num_bytes", "num_shards")
        }
    assert (artifact.stats["end_of_document_id"], artifact.stats["vocab_size"]) == (0, 380)
    num_bytes = sum(len(text.encode()) for text in PRACTICE)
    assert artifact.stats["bytes_per_token"] == round(num_bytes / sum(map(len, all_rows(artifact))), 4)
    assert artifact.manifest.produced_by["encoders"] == {"fastokens": len(list(artifact.shards()))}


def test_a_text_cannot_close_its_own_document(
    store: ArtifactStore, documents_of: Callable[..., Artifact], trained: Artifact
) -> None:
    rows = all_rows(build(store, documents_of(["one<|endoftext|>two", "three"]), trained))
    assert [row.count(0) for row in rows] == [1, 1]
    assert [row[-1] for row in rows] == [0, 0]


def test_a_tokenizer_without_the_end_of_document_token_is_refused(
    store: ArtifactStore, documents_of: Callable[..., Artifact], tokenizer: Artifact
) -> None:
    with pytest.raises(CorpusError, match=r"no token '</s>' .* special tokens are <\|endoftext\|>, <\|im_start\|>, <\|im_end\|>"):
        build_tokens(store, Machine(), TokensSpec(end_of_document="</s>"), documents=documents_of(["a"]), tokenizer=tokenizer)


def test_the_end_of_document_changes_the_identity() -> None:
    assert TokensSpec(end_of_document="<|im_end|>").identity() != TokensSpec().identity()


def test_another_tokenizer_gives_other_tokens_even_under_the_same_path(
    store: ArtifactStore, documents_of: Callable[..., Artifact], trained: Artifact, bytes_tokenizer: Path, tmp_path: Path
) -> None:
    folder, documents = tmp_path / "tokenizer", documents_of(["今天天气很好"])
    folder.mkdir()
    contents = []
    for source in (trained.path, bytes_tokenizer):
        (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        tokenizer = build_tokenizer(store, Machine(), TokenizerSpec(source=str(folder)))
        contents.append(build(store, documents, tokenizer).content)
    assert contents[0] != contents[1]


def test_workers_do_not_change_the_content(
    store: ArtifactStore, documents_of: Callable[..., Artifact], trained: Artifact
) -> None:
    documents, contents = documents_of(PRACTICE, shard_bytes=2_000), set()
    for num_workers in (1, 2, 3):
        contents.add(build(store, documents, trained, Machine(num_workers=num_workers)).content)
        forget(store, "tokens", "tokens-shard")
    assert len(contents) == 1


def forget(store: ArtifactStore, *kinds: str) -> None:
    for kind in kinds:
        (store.root / kind).rename(store.root.parent / f"{kind}-{len(list(store.root.parent.iterdir()))}")


def test_shards_that_are_found_are_not_handed_out(
    store: ArtifactStore, documents_of: Callable[..., Artifact], trained: Artifact
) -> None:
    handed_out: list[int] = []

    def run_here(function: Callable[[Any], Any], items: Sequence[Any], label: str) -> list[Any]:
        handed_out.append(len(items))
        return [function(item) for item in items]

    machine = Machine(runner=run_here)
    texts = [f"{i} {text}" for i in range(5) for text in PRACTICE]
    build(store, documents_of(texts, shard_bytes=4_000), trained, machine)
    grown = build(store, documents_of([*texts, "one more"], shard_bytes=4_000), trained, machine)
    assert handed_out[1] <= 2 < handed_out[0]
    assert len(list(grown.shards())) >= handed_out[0]


def test_a_killed_run_keeps_its_shards_and_ends_the_same(
    store: ArtifactStore, documents_of: Callable[..., Artifact], tokenizer: Artifact
) -> None:
    def run_two_and_die(function: Callable[[Any], Any], items: Sequence[Any], label: str) -> list[Any]:
        [function(item) for item in items[:2]]
        raise KeyboardInterrupt

    documents = documents_of(PRACTICE, shard_bytes=2_000)
    expected = build(store, documents, tokenizer).content
    forget(store, "tokens", "tokens-shard")
    with pytest.raises(KeyboardInterrupt):
        build(store, documents, tokenizer, Machine(runner=run_two_and_die))
    kept = {path: path.stat().st_mtime_ns for path in store.root.glob("tokens-shard/*/tokens.arrow")}
    assert len(kept) == 2
    assert build(store, documents, tokenizer).content == expected
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())


def test_a_fast_path_that_differs_leaves_the_reference_s_tokens_and_is_recorded(
    store: ArtifactStore, documents_of: Callable[..., Artifact], tokenizer: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(path: Path) -> Callable[[Sequence[str]], Encoded]:
        return lambda texts: Encoded(np.zeros(len(texts), np.int32), np.arange(len(texts) + 1))

    documents = documents_of(["ab", "c"])
    expected = build(store, documents, tokenizer)
    forget(store, "tokens", "tokens-shard")
    monkeypatch.setattr(encoder, "fast_encode", wrong)
    encoder.forget_encoders()
    found = build(store, documents, tokenizer)
    encoder.forget_encoders()
    assert found.content == expected.content
    assert found.manifest.produced_by["encoders"] == {"tokenizers": 1}
    (entry,) = found.shards()
    shard = store.load(entry.kind, entry.key)
    assert shard is not None
    assert "other ids" in shard.manifest.produced_by["encoder_note"]


def test_a_shard_that_does_not_agree_decides_nothing_for_the_shards_behind_it(
    store: ArtifactStore, documents_of: Callable[..., Artifact], tokenizer: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_for_one(path: Path) -> Callable[[Sequence[str]], Encoded]:
        exact = encoder.reference_encode(path)
        return lambda texts: exact([text.replace("first", "other") for text in texts])

    documents = documents_of(["first", "second", "third"], shard_bytes=1)
    monkeypatch.setattr(encoder, "fast_encode", wrong_for_one)
    encoder.forget_encoders()
    found = build(store, documents, tokenizer)
    encoder.forget_encoders()
    assert found.manifest.produced_by["encoders"] == {"tokenizers": 1, "fastokens": 2}


def test_golden_ids(store: ArtifactStore, documents_of: Callable[..., Artifact], tokenizer: Artifact) -> None:
    """A changed golden means that the stage's revision must rise."""
    rows = all_rows(build(store, documents_of(PRACTICE, shard_bytes=3_000), tokenizer))
    assert hashlib.sha256(orjson.dumps(rows)).hexdigest()[:16] == "cf4c5d53aa917811"


def test_shards_that_are_all_found_load_no_encoder(
    store: ArtifactStore, documents_of: Callable[..., Artifact], tokenizer: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_load(path: Path) -> Callable[[Sequence[str]], Encoded]:
        raise AssertionError(f"{path} was loaded")

    documents = documents_of(PRACTICE, shard_bytes=2_000)
    expected = build(store, documents, tokenizer).content
    forget(store, "tokens")
    monkeypatch.setattr(encoder, "reference_encode", no_load)
    assert build(store, documents, tokenizer).content == expected


def test_a_token_that_is_not_special_may_close_documents(
    store: ArtifactStore, documents_of: Callable[..., Artifact], tokenizer: Artifact
) -> None:
    documents, spec = documents_of(["ab", "c"], shard_bytes=1), TokensSpec(end_of_document="z")
    found = build_tokens(store, Machine(), spec, documents=documents, tokenizer=tokenizer)
    end = found.stats["end_of_document_id"]
    assert [row[-1] for row in all_rows(found)] == [end, end]
