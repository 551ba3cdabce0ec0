from pathlib import Path

import pytest

from tasks.store import ArtifactStore

MINIMAL = """
name: minimal
archive: {url: corpus.jsonl}
tokenizer: {train: {vocab_size: 300}}
blocks: {block_size: 16}
pretrained:
  model: {config: {model_type: qwen2, hidden_size: 32, num_hidden_layers: 1, vocab_size: 300, max_position_embeddings: 64}}
  global_batch_size: 2
  num_steps: 2
  learning_rate: 1e-3
"""


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    """A store of tiny models, made once: nobody writes into it."""
    from tests.flows.models import small_store  # here, since it takes torch

    return small_store(tmp_path_factory.mktemp("models"))


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    """A recipe from archive to pretrained, beside the place of its corpus."""
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path
