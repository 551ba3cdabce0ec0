"""Documents that share a block, kept from seeing each other: the logits of each are those that it has alone."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tasks.machine import Machine, TrainingSettings
from tasks.store import ArtifactStore, Work
from tasks.training.datasets import collate, open_rows, restarting_positions, training_loader, validation_batches
from tasks.training.launch import run_worker
from tasks.training.model import ModelSpec, completed_config
from tasks.training.optimization import OptimizationSpec
from tasks.training.order import RowOrder, Share
from tasks.training.pretrained import PretrainedSpec, block_rows
from tasks.training.run import Rows, Start, make_plan
from tasks.training.weights import new_model
from tests.training.small_inputs import BLOCK_SIZE, QWEN, VOCAB_SIZE, blocks_and_tokenizer, write_rows

END_ID = 0
# No padding id: torch gives its embedding no gradient and zeros, which the norms of a model without training blow up.
FIELDS = {**QWEN, "attention_dropout": 0.0, "initializer_range": 0.2, "pad_token_id": None}
CONFIG = completed_config(FIELDS, VOCAB_SIZE, END_ID)
# Of fp32 logits between -4 and 4: attention sums the same numbers in another order (largest seen: 2e-6).
TOLERANCE = 1e-5


def documents(num_rows: int, seed: int) -> np.ndarray:
    """Rows of random ids; about every fourth closes a document, and so some documents are empty but for it."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCAB_SIZE, size=(num_rows, BLOCK_SIZE), dtype=np.int32)
    ids[rng.random(ids.shape) < 0.25] = END_ID
    ids[0, 3:5] = END_ID
    return ids


def parts(ids_T: torch.Tensor) -> list[torch.Tensor]:
    """One row cut into its documents, each with the id that closes it."""
    ends = (torch.where(ids_T == END_ID)[0] + 1).tolist()
    borders = sorted({0, *ends, len(ids_T)})
    return [ids_T[a:b] for a, b in pairwise(borders)]


def model_of(attention: str) -> Any:
    torch.manual_seed(0)
    return new_model({"config": CONFIG, "attention": attention}).eval()


def test_positions_restart_behind_every_end_of_a_document() -> None:
    ids = np.array([[5, 6, 0, 7, 0, 0, 8, 9], [0, 5, 5, 5, 5, 5, 5, 0]])
    assert restarting_positions(ids, END_ID).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]


def test_a_block_without_an_end_is_one_document() -> None:
    assert restarting_positions(np.array([[5, 6, 7]]), END_ID).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_document_in_a_block_has_the_logits_that_it_has_alone(attention: str, num_rows: int) -> None:
    model = model_of(attention)
    rows = [{"input_ids": row} for row in documents(num_rows, seed=5)]
    batch, plain = collate(rows, END_ID), collate(rows)
    assert set(plain) == {"input_ids", "labels"}
    with torch.no_grad():
        together_BTV = model(**batch, use_cache=False).logits
        for row in range(num_rows):
            alone_TV = torch.cat(
                [model(input_ids=ids[None], use_cache=False).logits[0] for ids in parts(batch["input_ids"][row])]
            )
            torch.testing.assert_close(together_BTV[row], alone_TV, atol=TOLERANCE, rtol=0)
        across_BTV = model(**plain, use_cache=False).logits
    assert (across_BTV - together_BTV).abs().max() > 0.1  # this model would show a leak


def test_training_and_validation_rows_carry_the_positions(tmp_path: Path) -> None:
    rows = documents(5, seed=7)
    write_rows(tmp_path / "rows.arrow", rows)
    files, share = [str(tmp_path / "rows.arrow")], Share(0, 1, 2, 1)
    order = RowOrder(5, seed=3)
    (batch,) = training_loader(files, 3, share, first_step=1, num_steps=2, boundary_id=END_ID)
    expected = restarting_positions(rows[[order.row(2), order.row(3)]], END_ID)
    assert batch["position_ids"].tolist() == expected.tolist()
    assert "position_ids" not in next(iter(training_loader(files, 3, share, first_step=1, num_steps=2)))
    validated = torch.cat([batch["position_ids"] for batch in validation_batches(files, share, None, END_ID)])
    assert validated[:5].tolist() == restarting_positions(rows, END_ID).tolist()


def test_the_spec_decides_and_absent_is_across(tmp_path: Path) -> None:
    def spec(**fields: Any) -> PretrainedSpec:
        return PretrainedSpec(global_batch_size=4, num_steps=1, learning_rate=1e-3, model=ModelSpec(config=QWEN), **fields)

    absent, across, within = spec(), spec(document_attention="across"), spec(document_attention="within")
    assert absent.identity() == across.identity()
    assert "document_attention" not in absent.identity()  # keys of models trained before this field stay
    assert within.identity() == {**absent.identity(), "document_attention": "within"}
    _, blocks, tokenizer = blocks_and_tokenizer(tmp_path)
    assert block_rows(blocks, tokenizer, None, is_within=True).boundary_id == END_ID
    assert block_rows(blocks, tokenizer, None, is_within=False).boundary_id is None


def test_the_worker_trains_and_validates_documents_as_if_each_were_alone(tmp_path: Path) -> None:
    """Losses of one launch, before a weight has changed, against those of a bare model on whole and on cut rows."""
    write_rows(tmp_path / "train.arrow", documents(4, seed=11))
    write_rows(tmp_path / "validation.arrow", documents(3, seed=12))
    spec = OptimizationSpec(
        global_batch_size=4, num_steps=1, learning_rate=1e-9, precision="fp32", logging_steps=1, evaluation_steps=1
    )
    plans = []
    for name, boundary_id in (("across", None), ("within", END_ID)):
        (tmp_path / name).mkdir()
        work = Work(ArtifactStore(tmp_path / "store"), Machine(training=TrainingSettings(num_ranks=1)), tmp_path / name, None)
        files = [tmp_path / "train.arrow"], [tmp_path / "validation.arrow"]
        rows = Rows(*files, BLOCK_SIZE, VOCAB_SIZE, "data", boundary_id)
        plans.append(asdict(make_plan(work, spec, name, rows, Start(CONFIG, None, "sdpa", 64))))
    (tmp_path / "plans.json").write_text(json.dumps({"plans": plans}))
    metrics: list[dict[str, Any]] = []
    run_worker(
        "tests.training.broken_runs",
        tmp_path / "plans.json",
        num_ranks=1,
        settings=TrainingSettings(),
        on_metrics=metrics.append,
    )
    assert told(metrics, "loss") == pytest.approx(expected_losses(tmp_path / "train.arrow"), abs=TOLERANCE)
    validated = told(metrics, "validation_loss")
    assert [validated[1], validated[3]] == pytest.approx(expected_losses(tmp_path / "validation.arrow"), abs=TOLERANCE)


def told(metrics: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in metrics if name in row]


def expected_losses(path: Path) -> list[float]:
    """The mean loss of all ids but the first of each row: with whole rows, and with documents each alone."""
    torch.manual_seed(0)
    model = new_model({"config": CONFIG, "attention": "sdpa"}).eval()
    ids_BT = torch.from_numpy(np.stack([row["input_ids"] for row in open_rows([str(path)])]).astype(np.int64))
    with torch.no_grad():
        across_BTV = model(input_ids=ids_BT).logits
        within_BTV = torch.stack([torch.cat([model(input_ids=ids[None]).logits[0] for ids in parts(row)]) for row in ids_BT])
    return [float(cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())) for logits in (across_BTV, within_BTV)]
