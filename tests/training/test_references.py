"""Training rows told as documents: literal shards in, literal documents out."""

from pathlib import Path

import pyarrow as pa

from tasks.corpus.blocks import BlocksSpec, build_blocks
from tasks.machine import Machine
from tasks.schemas import TOKENS
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, shard_entry, stage
from tasks.training.pretrained import block_files
from tasks.training.references import Reference, row_references

# The ids of each document, by shard; blocks of 4 ids.
SHARDS = {"train/00000": [3, 6, 0, 2], "train/00001": [1, 1, 4]}


class TokensSpec(Spec):
    name: str = ""


@stage("tokens-shard", revision=1)
def build_tokens_shard(work: Work, spec: TokensSpec) -> Built:
    lengths = SHARDS[spec.name]
    with pa.OSFile(str(work.folder / "tokens.arrow"), "wb") as sink, pa.ipc.new_file(sink, TOKENS) as writer:
        for some in (lengths[:2], lengths[2:]):
            writer.write_batch(pa.record_batch([pa.array([[7] * n for n in some], TOKENS.field(0).type)], schema=TOKENS))
    return Built(stats={"num_tokens": sum(lengths), "num_documents": len(lengths), "num_bytes": 1})


@stage("tokens", revision=1)
def build_tokens(work: Work, spec: TokensSpec) -> Built:
    shards = tuple(shard_entry(name, build_tokens_shard(work.store, work.machine, TokensSpec(name=name))) for name in SHARDS)
    return Built(stats={"vocab_size": 9, "end_of_document_id": 0}, shards=shards)


def references(blocks: Artifact, *rows: int) -> list[list[str]]:
    files = block_files(blocks, "train")
    return [[str(reference) for reference in row] for row in row_references(rows, files, [2, 1, 1], blocks)]


def test_a_block_is_told_by_the_documents_it_has_ids_of(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    blocks = build_blocks(store, Machine(), BlocksSpec(block_size=4), tokens=build_tokens(store, Machine(), TokensSpec()))
    assert references(blocks, 0, 1, 2) == [
        ["train/00000 documents 0 to 1"],
        ["train/00000 document 1"],
        ["train/00001 documents 0 to 2"],
    ]
    # The tails: 3 ids of the first shard (the last of its document 1, and its document 3), 2 of the second.
    assert references(blocks, 3) == [["train/00000 documents 1 to 3", "train/00001 document 2"]]


def test_a_block_whose_tokens_are_gone_is_told_by_its_shard_and_row(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    blocks = build_blocks(store, Machine(), BlocksSpec(block_size=4), tokens=build_tokens(store, Machine(), TokensSpec()))
    for manifest in store.root.glob("tokens-shard/*/manifest.json"):
        manifest.unlink()
    assert references(blocks, 1) == [["row 1 of train/00000"]]


def test_a_row_of_examples_is_told_by_its_file(tmp_path: Path) -> None:
    assert row_references([5], [Path("a/train.arrow")], [9], None) == [[Reference("train.arrow", 5)]]
