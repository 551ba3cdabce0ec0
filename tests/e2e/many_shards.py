"""A corpus of more than 500 shards, of a few documents each: whether the Prefect UI stays usable."""

import json
from pathlib import Path

from tests.e2e.world import World, document

RECIPE = """
name: many-shards
archive: {url: many.jsonl}
documents: {validation_fraction: 0.05, shard_bytes: 4096}
tokenizer: {train: {vocab_size: 320}}
blocks: {block_size: 64}
pretrained:
  model: {config: {model_type: qwen2, hidden_size: 32, num_hidden_layers: 1, vocab_size: 320, max_position_embeddings: 64}}
  global_batch_size: 2
  num_steps: 2
  learning_rate: 1e-3
"""
NUM_DOCUMENTS = 9000  # 542 shards


def write_many_shards(world: World) -> str:
    """Write corpus and recipe into the world's folder; returns the recipe's name there."""
    lines = (json.dumps({"text": document(i)}, ensure_ascii=False) + "\n" for i in range(NUM_DOCUMENTS))
    Path(world.folder, "many.jsonl").write_text("".join(lines), encoding="utf-8")
    Path(world.folder, "many-shards.yaml").write_text(RECIPE)
    return "many-shards.yaml"
