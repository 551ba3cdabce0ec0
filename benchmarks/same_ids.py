"""Compares the ids in a store with those of Hugging Face `tokenizers` on the archive's own lines.

Reads   ARCHIVE                a .jsonl.tar.bz2
        STORE                  the documents and tokens that benchmarks.road made of it
        TOKENIZER/tokenizer.json

`python -m benchmarks.same_ids ARCHIVE STORE TOKENS --tokenizer DIR`, as corpus_vs_recipe runs it. Every document of the archive
must be the next one of the train or of the validation split, and its row of tokens must hold the reference's ids and then the
end-of-document id. Our tokens take what looks like a special token in a text as text, on purpose: so does the reference here.
"""

import argparse
import json
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.process_tree import Phases
from tasks.store import Artifact, ArtifactStore

BATCH_DOCUMENTS = 500

Row = tuple[str, Any]  # a document's text, and its ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("tokens", help="the tokens artifact, kind/key")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="compare the ids of every n-th document")
    told = parser.parse_args()
    from tokenizers import Tokenizer

    store = ArtifactStore(told.store)
    tokens = store.resolve(told.tokens)
    reference = Tokenizer.from_file(str(told.tokenizer / "tokenizer.json"))
    reference.encode_special_tokens = True
    phases, num_compared, num_different = Phases(), 0, 0
    with phases.phase("compare"):
        rows = islice(_rows(store, tokens, told.archive), 0, None, told.every)
        while batch := list(islice(rows, BATCH_DOCUMENTS)):
            encoded = reference.encode_batch([text for text, _ in batch], add_special_tokens=False)
            end = tokens.stats["end_of_document_id"]
            num_compared += len(batch)
            num_different += sum(
                not np.array_equal(ids, [*expected.ids, end]) for (_, ids), expected in zip(batch, encoded, strict=True)
            )
    phases.tell(num_compared=num_compared, num_different=num_different)


def _rows(store: ArtifactStore, tokens: Artifact, archive: Path) -> Iterator[Row]:
    """Each document of the archive with its ids, in the archive's order."""
    documents = store.resolve(tokens.manifest.produced_by["inputs"]["documents"])
    splits = {split: _split_rows(documents, tokens, split) for split in ("train", "validation")}
    heads = {split: next(rows, None) for split, rows in splits.items()}
    for number, text in enumerate(read_texts(archive), start=1):
        split = next((split for split, head in heads.items() if head is not None and head[0] == text), None)
        assert split is not None, f"{archive}: document {number} is in neither split where it should be"
        yield heads[split]  # type: ignore[misc]  # a head that is None has no text
        heads[split] = next(splits[split], None)
    assert not any(heads.values()), f"{documents.ref}: holds documents that the archive does not"


def _split_rows(documents: Artifact, tokens: Artifact, split: str) -> Iterator[Row]:
    for texts, ids in zip(documents.shards(split), tokens.shards(split), strict=True):
        with (
            pq.ParquetFile(documents.shard_file(texts, "documents.parquet")) as table,
            pa.memory_map(str(tokens.shard_file(ids, "tokens.arrow"))) as source,
        ):
            column = pa.ipc.open_file(source).read_all()["input_ids"]
            # The list's values are read as they lie, without a Python object an id.
            rows = (row.values.to_numpy() for row in column)
            every_text = (text for batch in table.iter_batches(1_000) for text in batch["text"].to_pylist())
            yield from zip(every_text, rows, strict=True)


def read_texts(archive: Path) -> Iterator[str]:
    """The texts of a .jsonl.tar.bz2, by nothing but the standard library."""
    with tarfile.open(archive, "r|bz2") as opened:
        for member in opened:
            lines = opened.extractfile(member)
            assert lines is not None, f"{archive}: {member.name} is not a file"
            yield from (json.loads(line)["text"] for line in lines)


if __name__ == "__main__":
    main()
