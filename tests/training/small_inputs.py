"""Inputs for training tests: artifacts of the kinds that training reads, tiny, in a real store."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from tasks.machine import Machine
from tasks.schemas import IGNORED_LABEL, blocks_schema, examples_schema
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, shard_entry, stage

BLOCK_SIZE = 16
VOCAB_SIZE = 60
END_OF_DOCUMENT_ID = 0
END_OF_TURN_ID = 2

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "attention_dropout": 0.1,
}


class InputSpec(Spec):
    """Decides the numbers that an input is made of."""

    seed: int = 0
    num_rows: int = 24


@stage("blocks-shard", revision=1)
def build_blocks_shard(work: Work, spec: InputSpec) -> Built:
    write_rows(work.folder / "blocks.arrow", random_blocks(spec.num_rows, spec.seed))
    return Built()


@stage("blocks", revision=1)
def build_blocks(work: Work, spec: InputSpec) -> Built:
    names = ["train/00000", "train/00001", "validation/00000"]
    sizes = [spec.num_rows // 2, spec.num_rows - spec.num_rows // 2 - 1, 5]
    shards = [
        build_blocks_shard(work.store, work.machine, InputSpec(seed=spec.seed * 10 + i, num_rows=size))
        for i, size in enumerate(sizes)
    ]
    write_rows(work.folder / "train-tail.arrow", random_blocks(1, spec.seed + 100))
    validation = {"num_tokens": 5 * BLOCK_SIZE, "num_bytes": 200, "num_blocks": 5}
    stats = {
        "block_size": BLOCK_SIZE,
        "vocab_size": VOCAB_SIZE,
        "end_of_document_id": END_OF_DOCUMENT_ID,
        "train": {"num_blocks": spec.num_rows},
        "validation": validation,
    }
    return Built(stats=stats, shards=tuple(shard_entry(name, shard) for name, shard in zip(names, shards, strict=True)))


@stage("tokenizer", revision=1)
def build_tokenizer(work: Work, spec: InputSpec) -> Built:
    added = [{"id": END_OF_DOCUMENT_ID, "content": "<|endoftext|>"}, {"id": END_OF_TURN_ID, "content": "<|im_end|>"}]
    (work.folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (work.folder / "tokenizer_config.json").write_text("{}")
    return Built(stats={"vocab_size": VOCAB_SIZE})


@stage("examples", revision=1)
def build_examples(work: Work, spec: InputSpec) -> Built:
    schema = examples_schema(BLOCK_SIZE)
    write_columns(work.folder / "train.arrow", schema, random_examples(spec.num_rows, spec.seed))
    write_columns(work.folder / "validation.arrow", schema, random_examples(3, spec.seed + 1))
    ends = {"<|im_end|>": END_OF_TURN_ID}
    return Built(stats={"block_size": BLOCK_SIZE, "vocab_size": VOCAB_SIZE, "num_rows": spec.num_rows, "end_markers": ends})


def random_blocks(num_rows: int, seed: int) -> np.ndarray:
    """Rows that can be learned: each counts up from a random id."""
    starts = np.random.default_rng(seed).integers(0, VOCAB_SIZE, size=(num_rows, 1))
    return ((starts + np.arange(BLOCK_SIZE)) % VOCAB_SIZE).astype(np.int32)


def random_examples(num_rows: int, seed: int) -> dict[str, np.ndarray]:
    """Two examples a row, of uneven lengths, supervised in uneven parts, and padding behind them."""
    rng = np.random.default_rng(seed)
    ids = random_blocks(num_rows, seed)
    labels = np.full_like(ids, IGNORED_LABEL)
    positions = np.zeros_like(ids)
    for row in range(num_rows):
        first, second = int(rng.integers(3, 8)), int(rng.integers(3, 8))
        lengths = [first, second, BLOCK_SIZE - first - second]
        positions[row] = np.concatenate([np.arange(length) for length in lengths])
        labels[row, first - 2 : first] = ids[row, first - 2 : first]
        labels[row, first + 1 : first + second] = ids[row, first + 1 : first + second]
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def write_rows(path: Path, rows: np.ndarray) -> None:
    write_columns(path, blocks_schema(rows.shape[1]), {"input_ids": rows})


def write_columns(path: Path, schema: pa.Schema, columns: dict[str, np.ndarray]) -> None:
    arrays = []
    for field in schema:
        values = columns[field.name]
        flat = pa.array(values.reshape(-1), pa.int32())
        arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))


def blocks_and_tokenizer(root: Path, num_rows: int = 24) -> tuple[ArtifactStore, Artifact, Artifact]:
    store = ArtifactStore(root)
    spec = InputSpec(num_rows=num_rows)
    return store, build_blocks(store, Machine(), spec), build_tokenizer(store, Machine(), spec)
