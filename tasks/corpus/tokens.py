"""Documents to tokens: one tokens shard per documents shard, one row per document, same order.

Reads   documents-shard  documents.parquet  DOCUMENTS: text
        tokenizer        tokenizer.json
Writes  tokens-shard     tokens.arrow       TOKENS: input_ids, every row closed by the end-of-document id
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from tasks.corpus.document_shards import open_documents
from tasks.corpus.encoder import Encoded, MismatchError, encoder_for, forget_encoders, one_core, start_encoder
from tasks.corpus.shards import ShardWork, build_shards, load_shards, sum_stats
from tasks.corpus.tokenizer import TOKENIZER_JSON, Vocabulary, read_vocabulary
from tasks.errors import CorpusError
from tasks.machine import Machine, give_back_memory
from tasks.schemas import DOCUMENTS, SPLITS, TOKENS, as_column
from tasks.store import Artifact, Built, Digest, Spec, Work, shard_entry, stage, store_of

# One call of the encoder: its threads' work for a few milliseconds; the reference's memory (about 150 bytes a token) stays
# under 50 MB. Neither number shows in the bytes.
BATCH_DOCUMENTS = 250
BATCH_CHARACTERS = 1 << 18

# From so many shards a worker on, shards alone keep the workers busy. The encoder's own threads then cost more than they give:
# on 1 GB of text 6% of the CPU seconds and 70 MB of caches.
ENOUGH_SHARDS = 4

# A record batch ends with the document that brings it to so many ids: 1 MB. Raise the shard's revision when you change it.
RECORD_IDS = 1 << 18

# Encodes texts, told the number of the first of them in its shard.
EncodeBatch = Callable[[Sequence[str], int], Encoded]


class TokensSpec(Spec):
    """How documents become rows of token ids."""

    end_of_document: str = Field("<|endoftext|>", min_length=1, description="the token whose id closes every document")


@stage("tokens", revision=1)
def build_tokens(work: Work, spec: TokensSpec, documents: Artifact, tokenizer: Artifact) -> Built:
    """Tokenize every documents shard in the pool."""
    end_id = end_of_document_id(spec, tokenizer)
    listed = list(documents.shards())
    items = [ShardWork(spec, {"documents": shard, "tokenizer": tokenizer}) for shard in load_shards(work.store, listed)]
    ready = encoding(tokenizer, work.machine, len(items))
    artifacts = build_shards(work, build_tokens_shard, tokenize_in_pool, items, "tokens", ready=ready)
    entries = tuple(shard_entry(entry.name, artifact) for entry, artifact in zip(listed, artifacts, strict=True))
    names = ("num_documents", "num_tokens", "num_bytes")
    splits = {split: sum_stats([entry for entry in entries if entry.split == split], *names) for split in SPLITS}
    num_tokens = sum(split["num_tokens"] for split in splits.values())
    stats = {
        "end_of_document_id": end_id,
        "vocab_size": tokenizer.stats["vocab_size"],
        **splits,
        "bytes_per_token": round(sum(split["num_bytes"] for split in splits.values()) / max(num_tokens, 1), 4),
    }
    return Built(stats=stats, shards=entries, produced_by={"encoders": _encoders(artifacts)})


def end_of_document_id(spec: TokensSpec, tokenizer: Artifact) -> int:
    """The id that closes every document. Raises CorpusError where the tokenizer has no such token."""
    special: dict[str, int] = tokenizer.stats["special_tokens"]
    if spec.end_of_document in special:
        return special[spec.end_of_document]
    found = _vocabulary(tokenizer.file(TOKENIZER_JSON), tokenizer.content).ids.get(spec.end_of_document)
    if found is None:
        raise CorpusError(
            f"{tokenizer.short}: no token {spec.end_of_document!r} to close documents with; its special tokens are "
            f"{', '.join(special) or 'none'}: set tokens.end_of_document to one of its tokens"
        )
    return found


@lru_cache(maxsize=1)
def _vocabulary(path: Path, content: Digest) -> Vocabulary:
    """All tokens of a tokenizer, read once a process; ``content`` keeps apart what may lie at one path."""
    return read_vocabulary(path)


@contextmanager
def encoding(tokenizer: Artifact, machine: Machine, num_shards: int) -> Iterator[None]:
    """The encoder of a tokenizer ready in this process where this process's threads will use it, and gone afterwards."""
    if not machine.has_processes:
        is_enough = num_shards >= ENOUGH_SHARDS * machine.num_workers
        start_encoder(tokenizer.file(TOKENIZER_JSON), tokenizer.content, 1 if is_enough else machine.num_workers)
    try:
        yield
    finally:
        forget_encoders()


def _encoders(artifacts: Sequence[Artifact]) -> dict[str, int]:
    """How many shards each encoder made."""
    names = [str(artifact.manifest.produced_by.get("encoder")) for artifact in artifacts]
    return {name: names.count(name) for name in sorted(set(names))}


def tokenize_in_pool(item: ShardWork) -> Artifact:
    """Build one tokens shard in this worker of the pool."""
    store = store_of(item.inputs["documents"])
    spec = item.spec
    assert isinstance(spec, TokensSpec)
    with one_core():
        artifact = build_tokens_shard(store, Machine(), spec, **item.inputs)
    give_back_memory()
    return artifact


@stage("tokens-shard", revision=2)
def build_tokens_shard(work: Work, spec: TokensSpec, documents: Artifact, tokenizer: Artifact) -> Built:
    """Tokenize one documents shard, by the reference where the fast encoder is found to differ."""
    encoder, end_id = encoder_for(tokenizer.file(TOKENIZER_JSON), tokenizer.content), end_of_document_id(spec, tokenizer)
    source, target = documents.file("documents.parquet"), work.folder / "tokens.arrow"
    try:
        num_tokens = tokenize_shard(source, target, encoder.encode, end_id)
    except MismatchError as mismatch:
        encoder = encoder.by_reference(mismatch)
        num_tokens = tokenize_shard(source, target, encoder.encode, end_id)
    counts = {name: documents.stats[name] for name in ("num_documents", "num_bytes")}
    return Built(
        stats={**counts, "num_tokens": num_tokens},
        produced_by={"encoder": encoder.path, **({"encoder_note": encoder.note} if encoder.note else {})},
    )


def tokenize_shard(source: Path, target: Path, encode: EncodeBatch, end_id: int) -> int:
    """Write ``target``, which exists only once it is complete; returns the number of tokens."""
    partial, num_documents = target.with_suffix(".partial"), 0
    with (
        open_documents(source) as table,
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, TOKENS) as file,
    ):
        writer = TokensWriter(file)
        for texts in read_batches(table):
            writer.write(close_documents(encode(texts, num_documents), end_id))
            num_documents += len(texts)
        writer.finish()
    partial.rename(target)
    return writer.num_tokens


class TokensWriter:
    """Writes documents' ids, taken however many at a time, in record batches that the documents alone decide."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.waiting: list[Encoded] = []
        self.num_waiting = self.num_tokens = 0

    def write(self, encoded: Encoded) -> None:
        self.waiting.append(encoded)
        self.num_waiting += len(encoded.ids)
        self.num_tokens += len(encoded.ids)
        if self.num_waiting >= RECORD_IDS:
            self._write_full_batches()

    def finish(self) -> None:
        if self.waiting:
            self.file.write_batch(to_batch(join(self.waiting)))

    def _write_full_batches(self) -> None:
        ids, offsets = join(self.waiting)
        while len(ids) >= RECORD_IDS:
            last = int(np.searchsorted(offsets, RECORD_IDS))
            end = offsets[last]
            self.file.write_batch(to_batch(Encoded(ids[:end], offsets[: last + 1])))
            ids, offsets = ids[end:], offsets[last:] - end
        self.waiting = [Encoded(ids, offsets)] if len(offsets) > 1 else []
        self.num_waiting = len(ids)


def join(pieces: Sequence[Encoded]) -> Encoded:
    """Several texts' ids end to end."""
    starts = np.cumsum([0, *(len(piece.ids) for piece in pieces)])
    ends = [piece.offsets[1:] + start for piece, start in zip(pieces, starts[:-1], strict=True)]
    return Encoded(np.concatenate([piece.ids for piece in pieces]), np.concatenate([np.zeros(1, np.int64), *ends]))


def read_batches(table: Any) -> Iterator[list[str]]:
    """A documents shard's texts, at most BATCH_DOCUMENTS and BATCH_CHARACTERS at a time (one longer text stands alone)."""
    for batch in table.iter_batches(BATCH_DOCUMENTS, columns=DOCUMENTS.names):
        texts: list[str] = []
        num_characters = 0
        for text in batch["text"].to_pylist():
            if texts and num_characters + len(text) > BATCH_CHARACTERS:
                yield texts
                texts, num_characters = [], 0
            texts.append(text)
            num_characters += len(text)
        yield texts


def close_documents(encoded: Encoded, end_id: int) -> Encoded:
    """Put ``end_id`` behind the ids of every document."""
    offsets = encoded.offsets + np.arange(len(encoded.offsets))
    ids: npt.NDArray[np.int32] = np.empty(offsets[-1], np.int32)
    is_end = np.zeros(len(ids), bool)
    is_end[offsets[1:] - 1] = True
    ids[is_end] = end_id
    ids[~is_end] = encoded.ids
    return Encoded(ids, offsets)


def to_batch(encoded: Encoded) -> Any:
    """Rows of ids as a TOKENS record batch over the same buffers."""
    offsets, ids = (as_column(values) for values in (encoded.offsets, encoded.ids))
    rows = pa.LargeListArray.from_arrays(offsets, ids, type=TOKENS.field("input_ids").type)
    return pa.record_batch([rows], schema=TOKENS)
