"""The rows that a finished artifact's files hold, counted anew and compared with what its manifest says.

Reads   documents-shard  documents.parquet              DOCUMENTS
        documents        quarantine.parquet             QUARANTINE
        tokens-shard     tokens.arrow                   TOKENS
        blocks-shard     blocks.arrow, tail.arrow       BLOCKS, TAIL
        blocks           train-tail.arrow, ...          BLOCKS
        examples         train.arrow, ..., held-out.arrow, quarantine.parquet
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.corpus.document_shards import open_documents
from tasks.schemas import DOCUMENTS, SPLITS
from tasks.store import Artifact

# What was counted, how many there are, and how many the manifest says there are.
Count = tuple[str, int, int]


def problems(artifact: Artifact) -> list[str]:
    """Every count that the files contradict, in words. The files' digests are taken for right."""
    recount = RECOUNTS.get(artifact.kind)
    try:
        counts = list(recount(artifact)) if recount else []
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        return [f"its files cannot be counted ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"]
    return [f"{name} is {said} in its manifest and {found} in its files" for name, found, said in counts if found != said]


def of_documents_shard(shard: Artifact) -> Iterator[Count]:
    found: Counter[str] = Counter()
    with open_documents(shard.file("documents.parquet")) as table:
        for batch in table.iter_batches(columns=DOCUMENTS.names):
            found["num_documents"] += len(batch)
            found["num_bytes"] += _total(pc.binary_length(batch["text"]))
            found["num_characters"] += _total(pc.utf8_length(batch["text"]))
    return ((name, found[name], shard.stats[name]) for name in ("num_documents", "num_bytes", "num_characters"))


def of_documents(documents: Artifact) -> Iterator[Count]:
    yield "num_quarantined", _parquet_rows(documents.file("quarantine.parquet")), documents.stats["num_quarantined"]


def of_tokens_shard(shard: Artifact) -> Iterator[Count]:
    with pa.memory_map(str(shard.file("tokens.arrow"))) as source:
        reader = pa.ipc.open_file(source)
        columns = [reader.get_batch(i).column(0) for i in range(reader.num_record_batches)]
        yield "num_documents", sum(map(len, columns)), shard.stats["num_documents"]
        yield "num_tokens", sum(len(column.flatten()) for column in columns), shard.stats["num_tokens"]


def of_blocks_shard(shard: Artifact) -> Iterator[Count]:
    yield "num_blocks", _stream_rows(shard.file("blocks.arrow")), shard.stats["num_blocks"]
    yield "num_tail", _stream_rows(shard.file("tail.arrow")), shard.stats["num_tail"]


def of_blocks(blocks: Artifact) -> Iterator[Count]:
    for split in SPLITS:
        rows = blocks.stats[split]["num_blocks"] - sum(entry.stats["num_blocks"] for entry in blocks.shards(split))
        yield f"{split} blocks of tails", _rows_if_any(blocks, f"{split}-tail.arrow"), rows


def of_examples(examples: Artifact) -> Iterator[Count]:
    stats, held_out = examples.stats, examples.stats.get("held_out", {})
    for split in SPLITS:
        yield f"{split} num_rows", _rows_if_any(examples, f"{split}.arrow"), stats[split]["num_rows"]
    yield "num_held_out", _rows_if_any(examples, "held-out.arrow"), held_out.get("num_held_out", 0)
    num_quarantined = stats["num_quarantined"] + held_out.get("num_quarantined", 0)
    yield "num_quarantined", _parquet_rows(examples.file("quarantine.parquet")), num_quarantined


RECOUNTS: dict[str, Callable[[Artifact], Iterator[Count]]] = {
    "documents": of_documents,
    "documents-shard": of_documents_shard,
    "tokens-shard": of_tokens_shard,
    "blocks": of_blocks,
    "blocks-shard": of_blocks_shard,
    "examples": of_examples,
}


def _total(lengths: Any) -> int:
    return pc.sum(lengths).as_py() or 0


def _parquet_rows(path: Path) -> int:
    return int(pq.read_metadata(path).num_rows)


def _rows_if_any(artifact: Artifact, name: str) -> int:
    """The rows of a file that is absent where it would have none."""
    return _stream_rows(artifact.file(name)) if artifact.has_file(name) else 0


def _stream_rows(path: Path) -> int:
    with pa.memory_map(str(path)) as source:
        return sum(batch.num_rows for batch in pa.ipc.open_stream(source))
