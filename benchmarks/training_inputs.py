"""The command line of the training benchmarks: a model shape, and random rows, since training is as fast on any numbers.

What a benchmark needs first (a base to finetune) is found in the store where an earlier one left it.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from tasks.machine import Machine, TrainingSettings
from tasks.schemas import IGNORED_LABEL, blocks_schema, examples_schema
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, stage
from tasks.training.model import ModelSpec
from tasks.training.pretrained import PretrainedSpec, build_pretrained

EXAMPLE_TOKENS = 128  # of one example; its last quarter is supervised


class RowsSpec(Spec):
    """Random rows."""

    num_rows: int = Field(description="rows")
    block_size: int = Field(description="ids a row")
    vocab_size: int = Field(description="ids there are")


@stage("blocks", revision=1)
def build_random_blocks(work: Work, spec: RowsSpec) -> Built:
    """Blocks without a shard: all rows in the tails' file."""
    write_blocks(work.folder / "train-tail.arrow", spec)
    return Built(stats={"block_size": spec.block_size, "vocab_size": spec.vocab_size, "end_of_document_id": 0})


@stage("tokenizer", revision=1)
def build_no_tokenizer(work: Work, spec: RowsSpec) -> Built:
    """As much of a tokenizer as training reads."""
    (work.folder / "tokenizer.json").write_text(json.dumps({"added_tokens": []}))
    return Built(stats={"vocab_size": spec.vocab_size})


@stage("examples", revision=1)
def build_random_examples(work: Work, spec: RowsSpec) -> Built:
    """Examples of one length, packed."""
    ids = _ids(spec)
    positions = np.broadcast_to(np.arange(spec.block_size) % EXAMPLE_TOKENS, ids.shape)
    labels = np.where(positions >= EXAMPLE_TOKENS * 3 // 4, ids, IGNORED_LABEL)
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    _write(work.folder / "train.arrow", examples_schema(spec.block_size), columns)
    return Built(stats={"block_size": spec.block_size, "vocab_size": spec.vocab_size})


@dataclass(frozen=True)
class Inputs:
    """What a benchmark was told on its command line."""

    store: ArtifactStore
    machine: Machine
    rows: RowsSpec
    config: dict[str, Any]
    optimization: dict[str, Any]

    def pretrained(self) -> Artifact:
        spec = PretrainedSpec(**self.optimization, model=ModelSpec(config=self.config))
        blocks, tokenizer = (build(self.store, self.machine, self.rows) for build in (build_random_blocks, build_no_tokenizer))
        return build_pretrained(self.store, self.machine, spec, blocks=blocks, tokenizer=tokenizer)

    def examples(self) -> Artifact:
        return build_random_examples(self.store, self.machine, self.rows)

    def forget(self, kind: str) -> None:
        """Remove the artifacts of this kind from the store, so that they are built again."""
        shutil.rmtree(self.store.root / kind, ignore_errors=True)


def counts(model: Artifact, inputs: Inputs) -> Mapping[str, Any]:
    """What went through a training run; tokens_per_second is the median between reports, without the start."""
    produced_by = model.manifest.produced_by
    told = ("tokens_per_second", "num_ranks", "micro_batch_size", "accumulation", "zero_stage")
    return {
        "tokens": inputs.rows.num_rows * inputs.rows.block_size,
        "num_parameters": model.stats["num_parameters"],
        "precision": inputs.optimization["precision"],
        **{name: produced_by[name] for name in told},
    }


def read_inputs(description: str | None) -> Inputs:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--store", type=Path, required=True, help="a folder for the artifacts; keep it between benchmarks")
    parser.add_argument("--ranks", type=int, help="processes; without it what the machine has")
    parser.add_argument("--deepspeed", type=Path, help="a DeepSpeed file; without it deepspeed_configs/zero2.json")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--micro-batch-size", type=int, help="rows a rank takes at once")
    parser.add_argument("--steps", type=int, default=20, help="of --batch-size rows")
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step, over all ranks")
    parser.add_argument("--block-size", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=192, help="width of the Qwen2-shaped model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    told = parser.parse_args()
    settings = TrainingSettings(num_ranks=told.ranks, deepspeed_config=told.deepspeed, micro_batch_size=told.micro_batch_size)
    return Inputs(
        store=ArtifactStore(told.store),
        machine=Machine(training=settings),
        rows=RowsSpec(num_rows=told.steps * told.batch_size, block_size=told.block_size, vocab_size=told.vocab_size),
        config=qwen_config(told.hidden, told.layers, told.vocab_size, told.block_size, queries_a_key=3),
        optimization={
            "global_batch_size": told.batch_size,
            "num_steps": told.steps,
            "learning_rate": 1e-3,
            "precision": told.precision,
            "logging_steps": 2,
        },
    )


def qwen_config(hidden: int, layers: int, vocab_size: int, block_size: int, queries_a_key: int) -> dict[str, Any]:
    """A Qwen2-shaped model with heads 32 wide; so many heads of queries share one of keys."""
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": max(1, hidden // 32 // queries_a_key),
        "vocab_size": vocab_size,
        "max_position_embeddings": block_size,
        "tie_word_embeddings": True,
    }


def write_blocks(path: Path, spec: RowsSpec) -> None:
    """An Arrow stream of random blocks."""
    _write(path, blocks_schema(spec.block_size), {"input_ids": _ids(spec)})


def _ids(spec: RowsSpec) -> np.ndarray:
    return np.random.default_rng(0).integers(0, spec.vocab_size, size=(spec.num_rows, spec.block_size), dtype=np.int32)


def _write(path: Path, schema: pa.Schema, columns: Mapping[str, np.ndarray]) -> None:
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.array(columns[field.name].reshape(-1), pa.int32()), type=field.type)
        for field in schema
    ]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
