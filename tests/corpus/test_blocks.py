import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.corpus.blocks import BlocksSpec, build_blocks, open_blocks, pack, read_ids, read_tail, write_tail
from tasks.corpus.tokens import TokensSpec, build_tokens
from tasks.errors import CorpusError
from tasks.machine import Machine
from tasks.schemas import TAIL, blocks_schema
from tasks.store import Artifact, ArtifactStore

from .conftest import PRACTICE

Ids = npt.NDArray[np.int32]


def int32(*ids: int) -> Ids:
    return np.array(ids, np.int32)


def test_a_stream_is_cut_into_blocks_and_a_tail() -> None:
    blocks, tail = pack(int32(1, 2, 3, 4, 5, 6, 7), 3)
    assert (blocks.tolist(), tail.tolist()) == ([[1, 2, 3], [4, 5, 6]], [7])


@pytest.mark.parametrize(("num_ids", "num_blocks", "num_tail"), [(0, 0, 0), (2, 0, 2), (3, 1, 0), (4, 1, 1)])
def test_the_tail_is_shorter_than_a_block(num_ids: int, num_blocks: int, num_tail: int) -> None:
    blocks, tail = pack(np.arange(num_ids, dtype=np.int32), 3)
    assert (blocks.shape, tail.shape) == ((num_blocks, 3), (num_tail,))


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=40), max_size=8), st.integers(2, 9))
def test_packing_shard_by_shard_keeps_every_token_in_order(shards: list[list[int]], block_size: int) -> None:
    packed = [pack(np.array(ids, np.int32), block_size) for ids in shards]
    assert [[*blocks.reshape(-1).tolist(), *tail.tolist()] for blocks, tail in packed] == shards
    tails = np.concatenate([np.empty(0, np.int32), *(tail for _, tail in packed)])
    last, remainder = pack(tails, block_size)
    assert [*last.reshape(-1).tolist(), *remainder.tolist()] == tails.tolist()
    num_blocks = len(last) + sum(len(blocks) for blocks, _ in packed)
    assert sum(map(len, shards)) == num_blocks * block_size + len(remainder)
    assert len(remainder) < block_size


def write_blocks(path: Path, blocks: Any) -> None:
    with open_blocks(path, blocks.shape[1]) as writer:
        for half in np.array_split(blocks, 2):
            writer.write(half)


@pytest.mark.parametrize("num_blocks", [0, 1, 5])
def test_blocks_are_written_as_their_schema(tmp_path: Path, num_blocks: int) -> None:
    blocks = np.arange(num_blocks * 4, dtype=np.int32).reshape(-1, 4)
    write_blocks(tmp_path / "blocks.arrow", blocks)
    table = pa.ipc.open_stream(pa.memory_map(str(tmp_path / "blocks.arrow"))).read_all()
    assert table.schema.equals(blocks_schema(4))
    assert table["input_ids"].to_pylist() == blocks.tolist()


def test_a_tail_is_written_as_its_schema(tmp_path: Path) -> None:
    write_tail(tmp_path / "tail.arrow", int32(7, 8))
    assert pa.ipc.open_stream(pa.OSFile(str(tmp_path / "tail.arrow"))).schema.equals(TAIL)
    assert read_tail(tmp_path / "tail.arrow").tolist() == [7, 8]


def test_datasets_opens_blocks_as_they_are_memory_mapped(tmp_path: Path) -> None:
    from datasets import Dataset

    blocks = np.arange(1 << 20, dtype=np.int32).reshape(-1, 1024)
    write_blocks(tmp_path / "blocks.arrow", blocks)
    before = pa.total_allocated_bytes()
    dataset = Dataset.from_file(str(tmp_path / "blocks.arrow"))
    assert pa.total_allocated_bytes() - before < blocks.nbytes / 100  # mapped, not read
    assert list(tmp_path.iterdir()) == [tmp_path / "blocks.arrow"]  # nor converted into another file
    assert dataset.with_format("numpy")[700]["input_ids"].tolist() == blocks[700].tolist()


def test_datasets_opens_a_shard_without_a_block(tmp_path: Path) -> None:
    from datasets import Dataset

    write_blocks(tmp_path / "blocks.arrow", np.empty((0, 4), np.int32))
    assert len(Dataset.from_file(str(tmp_path / "blocks.arrow"))) == 0


@pytest.fixture
def tokens_of(store: ArtifactStore, documents_of: Callable[..., Artifact], tokenizer: Artifact) -> Callable[..., Artifact]:
    def make(texts: list[str], **fields: Any) -> Artifact:
        documents = documents_of(texts, **fields)
        return build_tokens(store, Machine(), TokensSpec(), documents=documents, tokenizer=tokenizer)

    return make


def build(store: ArtifactStore, tokens: Artifact, block_size: int, machine: Machine | None = None) -> Artifact:
    return build_blocks(store, machine or Machine(), BlocksSpec(block_size=block_size), tokens=tokens)


def rows_of(path: Path) -> list[list[int]]:
    rows: list[list[int]] = pa.ipc.open_stream(pa.OSFile(str(path))).read_all()["input_ids"].to_pylist()
    return rows


def all_rows(artifact: Artifact, split: str) -> list[list[int]]:
    shards = [row for entry in artifact.shards(split) for row in rows_of(artifact.shard_file(entry, "blocks.arrow"))]
    name = f"{split}-tail.arrow"
    return shards + (rows_of(artifact.file(name)) if artifact.has_file(name) else [])


@pytest.mark.parametrize("block_size", [2, 7, 64, 1_000])
def test_blocks_and_tails_hold_every_token_of_their_split(
    store: ArtifactStore, tokens_of: Callable[..., Artifact], block_size: int
) -> None:
    tokens = tokens_of(PRACTICE, shard_bytes=1_500, validation_fraction=0.3)
    artifact = build(store, tokens, block_size)
    for split in ("train", "validation"):
        whole, tails = [], []
        for entry in tokens.shards(split):
            ids = np.concatenate(list(read_ids(tokens.shard_file(entry, "tokens.arrow")))).tolist()
            end = len(ids) - len(ids) % block_size
            whole, tails = whole + ids[:end], tails + ids[end:]
        flat = [token for row in all_rows(artifact, split) for token in row]
        assert flat == whole + tails[: len(tails) - len(tails) % block_size]
        counts = artifact.stats[split]
        assert counts["num_tokens"] == len(whole) + len(tails) == tokens.stats[split]["num_tokens"]
        assert counts["num_tokens"] == counts["num_blocks"] * block_size + counts["num_remainder"]
        assert counts["num_blocks"] == len(all_rows(artifact, split))
        assert counts["num_remainder"] < block_size


def test_the_facts_that_training_needs_are_told(store: ArtifactStore, tokens_of: Callable[..., Artifact]) -> None:
    stats = build(store, tokens_of(["abc", "de"]), 2).stats
    assert {name: stats[name] for name in ("block_size", "vocab_size", "end_of_document_id")} == {
        "block_size": 2, "vocab_size": 259, "end_of_document_id": 256,
    }  # fmt: skip
    assert stats["train"] == {"num_tokens": 7, "num_documents": 2, "num_bytes": 5, "num_blocks": 3, "num_remainder": 1}
    assert stats["validation"]["num_blocks"] == 0


def test_tails_that_make_no_block_leave_no_file(store: ArtifactStore, tokens_of: Callable[..., Artifact]) -> None:
    artifact = build(store, tokens_of(["abc", "de"]), 4)
    assert [entry.name for entry in artifact.manifest.files] == []
    assert artifact.stats["train"]["num_remainder"] == 3


def test_a_train_split_shorter_than_a_block_is_refused(store: ArtifactStore, tokens_of: Callable[..., Artifact]) -> None:
    with pytest.raises(CorpusError, match="the train split has 7 tokens, fewer than one block of 8"):
        build(store, tokens_of(["abc", "de"]), 8)


def test_workers_do_not_change_the_content(store: ArtifactStore, tokens_of: Callable[..., Artifact]) -> None:
    tokens, contents = tokens_of(PRACTICE, shard_bytes=1_500), set()
    for num_workers in (1, 2, 3):
        contents.add(build(store, tokens, 64, Machine(num_workers=num_workers)).content)
        for kind in ("blocks", "blocks-shard"):
            (store.root / kind).rename(store.root.parent / f"{kind}-{num_workers}")
    assert len(contents) == 1


def test_block_size_changes_the_identity() -> None:
    assert BlocksSpec(block_size=1024).identity() != BlocksSpec().identity()


def test_golden_blocks(store: ArtifactStore, tokens_of: Callable[..., Artifact]) -> None:
    """A changed golden means that the stage's revision must rise."""
    artifact = build(store, tokens_of(PRACTICE, shard_bytes=3_000), 64)
    assert hashlib.sha256(orjson.dumps(all_rows(artifact, "train"))).hexdigest()[:16] == "2e26e3df14b8432b"
