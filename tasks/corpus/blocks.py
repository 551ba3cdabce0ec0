"""Tokens to blocks: rows of exactly block_size ids, cut from a shard's documents end to end.

Reads   tokens-shard  tokens.arrow           TOKENS: input_ids
Writes  blocks-shard  blocks.arrow           BLOCKS: input_ids, block_size ids a row (IPC stream)
                      tail.arrow             TAIL: the ids left over, fewer than block_size (IPC stream)
        blocks        train-tail.arrow       BLOCKS: made of the tails of the split's shards, in their order (IPC stream);
                      validation-tail.arrow  absent where they make no row
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from tasks.corpus.shards import ShardWork, build_shards, load_shards
from tasks.errors import CorpusError
from tasks.machine import Machine
from tasks.schemas import SPLITS, TAIL, as_column, as_ids, as_rows, blocks_schema
from tasks.store import Artifact, Built, Spec, Work, shard_entry, stage, store_of

log = logging.getLogger(__name__)

Ids = npt.NDArray[np.int32]

# A record batch of 4 MB: few enough to open at once, small enough to map a part. Raise the revisions when you change it.
BATCH_IDS = 1 << 20


class BlocksSpec(Spec):
    """How long a block is."""

    block_size: int = Field(2048, ge=2, description="token ids a block")


@stage("blocks", revision=1)
def build_blocks(work: Work, spec: BlocksSpec, tokens: Artifact) -> Built:
    """Pack every tokens shard in the pool, then the tails of each split; less than one block a split is dropped."""
    listed = list(tokens.shards())
    items = [ShardWork(spec, {"tokens": shard}) for shard in load_shards(work.store, listed)]
    artifacts = build_shards(work, build_blocks_shard, pack_in_pool, items, "blocks")
    splits = {}
    for split in SPLITS:
        shards = [artifact for entry, artifact in zip(listed, artifacts, strict=True) if entry.split == split]
        splits[split] = _pack_tails(work.folder / f"{split}-tail.arrow", shards, spec.block_size)
    if splits["train"]["num_blocks"] == 0:
        raise CorpusError(
            f"{tokens.short}: the train split has {splits['train']['num_tokens']} tokens, fewer than one block of "
            f"{spec.block_size}; take more documents or set a smaller blocks.block_size"
        )
    if splits["validation"]["num_tokens"] and not splits["validation"]["num_blocks"]:
        log.warning("%s: the validation split has fewer tokens than one block of %d", tokens.short, spec.block_size)
    told = {name: tokens.stats[name] for name in ("vocab_size", "end_of_document_id")}
    return Built(
        stats={"block_size": spec.block_size, **told, **splits},
        shards=tuple(shard_entry(entry.name, artifact) for entry, artifact in zip(listed, artifacts, strict=True)),
    )


def _pack_tails(path: Path, shards: Sequence[Artifact], block_size: int) -> dict[str, int]:
    """Pack the tails of a split's shards; returns the split's counts, every token among them."""
    tails = [read_tail(shard.file("tail.arrow")) for shard in shards]
    blocks, remainder = pack(np.concatenate([np.empty(0, np.int32), *tails]), block_size)
    if len(blocks):
        with open_blocks(path, block_size) as writer:
            writer.write(blocks)
    else:
        path.unlink(missing_ok=True)
    counts = {name: sum(shard.stats[name] for shard in shards) for name in ("num_tokens", "num_documents", "num_bytes")}
    num_blocks = sum(shard.stats["num_blocks"] for shard in shards) + len(blocks)
    assert counts["num_tokens"] == num_blocks * block_size + len(remainder), "tokens were lost or made in packing"
    return {**counts, "num_blocks": num_blocks, "num_remainder": len(remainder)}


def pack_in_pool(item: ShardWork) -> Artifact:
    """Build one blocks shard in this worker of the pool."""
    spec = item.spec
    assert isinstance(spec, BlocksSpec)
    return build_blocks_shard(store_of(item.inputs["tokens"]), Machine(), spec, **item.inputs)


@stage("blocks-shard", revision=1)
def build_blocks_shard(work: Work, spec: BlocksSpec, tokens: Artifact) -> Built:
    """Pack one tokens shard."""
    source, target = tokens.file("tokens.arrow"), work.folder / "blocks.arrow"
    num_blocks, tail = pack_shard(source, target, spec.block_size)
    found = num_blocks * spec.block_size + len(tail)
    assert found == tokens.stats["num_tokens"], f"{source} has {found} tokens, and says that it has {tokens.stats['num_tokens']}"
    write_tail(work.folder / "tail.arrow", tail)
    counts = {name: tokens.stats[name] for name in ("num_tokens", "num_documents", "num_bytes")}
    return Built(stats={**counts, "num_blocks": num_blocks, "num_tail": len(tail)})


def pack_shard(source: Path, target: Path, block_size: int) -> tuple[int, Ids]:
    """Pack a tokens shard into ``target``; returns the number of blocks, and the tail. Holds a few MB at any size."""
    tail = np.empty(0, np.int32)
    with open_blocks(target, block_size) as writer:
        for ids in read_ids(source):
            blocks, tail = pack(np.concatenate([tail, ids]), block_size)
            writer.write(blocks)
    return writer.num_blocks, tail


def pack(ids: Ids, block_size: int) -> tuple[Ids, Ids]:
    """Cut one stream of token ids into blocks.

    ids: (num_tokens,). Returns views: (num_tokens // block_size, block_size), and the tail, fewer than block_size ids.
    As GPT-3 (arXiv:2005.14165, appendix B): documents share a block.
    """
    end = len(ids) - len(ids) % block_size
    return ids[:end].reshape(-1, block_size), ids[end:]


def read_ids(path: Path) -> Iterator[Ids]:
    """The ids of a tokens shard, end to end, at least BATCH_IDS at a time but for the last."""
    waiting: list[Ids] = []
    with pa.OSFile(str(path)) as source:  # not mapped: pages that were read would count as this process's memory
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            waiting.append(as_ids(reader.get_batch(number).column(0).flatten()))
            if sum(map(len, waiting)) >= BATCH_IDS:
                yield np.concatenate(waiting)
                waiting = []
    if waiting:
        yield np.concatenate(waiting)


class BlocksWriter:
    """Writes blocks (n, block_size), taken however many at a time, in record batches of BATCH_IDS ids."""

    def __init__(self, writer: Any, block_size: int) -> None:
        self.writer, self.schema = writer, blocks_schema(block_size)
        self.rows = max(1, BATCH_IDS // block_size)
        self.waiting = np.empty((0, block_size), np.int32)
        self.num_blocks = 0

    def write(self, blocks: Ids) -> None:
        self.num_blocks += len(blocks)
        self.waiting = np.concatenate([self.waiting, blocks])
        while len(self.waiting) >= self.rows:
            self._write_batch(self.waiting[: self.rows])
            self.waiting = self.waiting[self.rows :]

    def finish(self) -> None:
        """Write what waits; one empty batch where there is no block: datasets opens no stream without a batch."""
        if len(self.waiting) or not self.num_blocks:
            self._write_batch(self.waiting)

    def _write_batch(self, blocks: Ids) -> None:
        self.writer.write_batch(pa.record_batch([as_rows(blocks, self.schema.field(0))], schema=self.schema))


@contextmanager
def open_blocks(path: Path, block_size: int) -> Iterator[BlocksWriter]:
    """A BLOCKS file that is being written."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, blocks_schema(block_size)) as stream:
        writer = BlocksWriter(stream, block_size)
        yield writer
        writer.finish()


def write_tail(path: Path, tail: Ids) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, TAIL) as writer:
        writer.write_batch(pa.record_batch([as_column(tail)], schema=TAIL))


def read_tail(path: Path) -> Ids:
    """The ids of a TAIL file."""
    with pa.OSFile(str(path)) as source:
        return as_ids(pa.ipc.open_stream(source).read_all()["input_ids"].combine_chunks())
