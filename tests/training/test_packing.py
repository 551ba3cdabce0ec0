"""Examples that the packer has put into one row, to a model: each is as if it were alone, in logits, loss and gradients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.corpus.packing import Packer
from tasks.schemas import IGNORED_LABEL
from tasks.training.datasets import Batch, collate, open_rows
from tasks.training.weights import new_model

BLOCK_SIZE, VOCAB_SIZE = 64, 64
CONFIG = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB_SIZE, "max_position_embeddings": BLOCK_SIZE, "initializer_range": 0.2,
}  # fmt: skip
# Of fp32 logits between -4 and 4, and of gradients of their order: the same numbers summed in another order.
TOLERANCE = 1e-5

Example = tuple[np.ndarray, np.ndarray]


def model_of(attention: str) -> Any:
    torch.manual_seed(0)
    return new_model({"config": CONFIG, "attention": attention}).eval()


def packed(folder: Path) -> tuple[Batch, list[list[Example]]]:
    """Two rows of several examples, one of them without room for padding, and which examples stand in each."""
    rng = np.random.default_rng(3)
    made: list[Example] = []
    packer = Packer(folder, "train", BLOCK_SIZE)
    for length in (40, 21, 3, 30, 14, 9, 2):
        ids = rng.integers(1, VOCAB_SIZE, size=length, dtype=np.int32)
        made.append((ids, np.where(np.arange(length) >= length // 2, ids, np.int32(IGNORED_LABEL))))
        packer.add(*made[-1])
    packer.write(folder / "train.arrow", 0, lambda amount: None)
    batch = collate(list(open_rows([str(folder / "train.arrow")])))
    assert [len(row) for row in packer.rows] == [3, 4]
    return batch, [[made[example] for example in row] for row in packer.rows]


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))[None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_each_example_has_the_logits_that_it_has_alone(tmp_path: Path, attention: str, num_rows: int) -> None:
    model = model_of(attention)
    batch, rows = packed(tmp_path)
    batch = {name: column[:num_rows] for name, column in batch.items()}
    with torch.no_grad():
        together_BTV = model(**batch, use_cache=False).logits
        for number in range(num_rows):
            alone = [model(input_ids=tensor(ids), use_cache=False).logits[0] for ids, _ in rows[number]]
            alone_TV = torch.cat(alone)
            torch.testing.assert_close(together_BTV[number, : len(alone_TV)], alone_TV, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_are_those_of_the_examples_each_alone(tmp_path: Path, attention: str) -> None:
    together, apart = model_of(attention), model_of(attention)
    batch, rows = packed(tmp_path)
    num_supervised = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
    loss = together(**batch, use_cache=False, num_items_in_batch=num_supervised).loss
    loss.backward()
    total = 0.0
    for ids, labels in (example for row in rows for example in row):
        told = {"input_ids": tensor(ids), "labels": tensor(labels)}
        alone = apart(**told, use_cache=False, num_items_in_batch=num_supervised).loss
        alone.backward()
        total += alone.item()
    assert loss.item() == pytest.approx(total, abs=TOLERANCE)
    for (name, ours), theirs in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=TOLERANCE, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "leak",
    [
        pytest.param({"attention_mask": torch.ones(2, BLOCK_SIZE, dtype=torch.int64)}, id="a mask, if only of ones"),
        pytest.param({"use_cache": True}, id="a cache, which is the default"),
        pytest.param({"position_ids": torch.arange(BLOCK_SIZE).expand(2, -1)}, id="positions that run on"),
    ],
)
def test_what_would_let_examples_see_each_other_shows(tmp_path: Path, leak: dict[str, Any]) -> None:
    """Why batches carry no attention mask, and the worker no cache: this says nothing when it happens."""
    model = model_of("sdpa")
    batch, _ = packed(tmp_path)
    with torch.no_grad():
        right_BTV = model(**batch, use_cache=False).logits
        leaking_BTV = model(**{**batch, "use_cache": False, **leak}).logits
    assert (leaking_BTV - right_BTV).abs().max() > 0.1
