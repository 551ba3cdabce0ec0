"""Rows as the model sees them: memory-mapped, and in order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.errors import CorpusError
from tasks.schemas import IGNORED_LABEL, blocks_schema, examples_schema
from tasks.training.datasets import collate, open_rows, training_loader, validation_batches
from tasks.training.loss import summed_loss
from tasks.training.order import RowOrder, Share
from tests.training.small_inputs import BLOCK_SIZE, QWEN, random_examples, write_columns, write_rows


def numbered(tmp_path: Path, *sizes: int) -> list[str]:
    """Files of rows that hold their own number."""
    files, start = [], 0
    for index, size in enumerate(sizes):
        path = tmp_path / f"{index}.arrow"
        write_rows(path, np.repeat(np.arange(start, start + size)[:, None], BLOCK_SIZE, axis=1))
        files.append(str(path))
        start += size
    return files


def test_rows_of_many_files_count_through_and_empty_files_are_nothing(tmp_path: Path) -> None:
    rows = open_rows(numbered(tmp_path, 3, 0, 2))
    assert [int(row["input_ids"][0]) for row in rows] == [0, 1, 2, 3, 4]


def test_rows_are_memory_mapped_and_not_copied(tmp_path: Path) -> None:
    row = open_rows(numbered(tmp_path, 3, 2))[4]
    assert not row["input_ids"].flags.owndata
    assert not row["input_ids"].flags.writeable


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    (file,) = numbered(tmp_path, 3)
    Path(file).write_bytes(Path(file).read_bytes()[:40])
    with pytest.raises(CorpusError, match=r"0\.arrow: cannot be read as an Arrow stream"):
        open_rows([file])


def test_a_blocks_labels_are_its_ids_and_there_is_no_attention_mask(tmp_path: Path) -> None:
    batch = collate([open_rows(numbered(tmp_path, 3))[1]])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_a_resumed_loader_gives_the_rows_that_are_still_to_do(tmp_path: Path) -> None:
    files = numbered(tmp_path, 3, 4)
    order = RowOrder(7, seed=5)
    share = Share(rank=1, num_ranks=2, micro_batch_size=1, accumulation=2)
    loader = training_loader(files, 5, share, first_step=2, num_steps=4)
    rows = [int(batch["input_ids"][0, 0]) for batch in loader]
    assert rows == [order.row(position) for position in (9, 11, 13, 15)]
    assert len(loader) == 8  # of the whole run, as Trainer counts


def test_a_loader_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(training_loader(numbered(tmp_path, 3), 5, Share(0, 1, 1, 1), first_step=0, num_steps=2))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_validation_row_counts_once_and_all_ranks_do_as_many_batches(tmp_path: Path, num_ranks: int) -> None:
    files = numbered(tmp_path, 2, 3)
    shares = [Share(rank, num_ranks, 2, 1) for rank in range(num_ranks)]
    batches = [list(validation_batches(files, share, None)) for share in shares]
    assert len({len(each) for each in batches}) == 1
    counted = [int(row[0]) for each in batches for batch in each for row in batch["labels"] if row[0] != IGNORED_LABEL]
    assert sorted(counted) == [0, 1, 2, 3, 4]


def test_a_limit_takes_the_first_validation_rows(tmp_path: Path) -> None:
    (batch,) = validation_batches(numbered(tmp_path, 5), Share(0, 1, 4, 1), 3)
    assert batch["labels"][:, 0].tolist() == [0, 1, 2, IGNORED_LABEL]


def test_the_validation_loss_counts_supervised_tokens_alone(tmp_path: Path) -> None:
    model = small_model("sdpa")
    write_columns(tmp_path / "train.arrow", examples_schema(BLOCK_SIZE), random_examples(3, seed=3))
    batch = collate(list(open_rows([str(tmp_path / "train.arrow")])))
    supervised = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
    with torch.no_grad():
        expected = model(**batch, use_cache=False).loss  # the mean over the same tokens
        total = summed_loss(model, dict(batch))
    assert total[1] == supervised
    torch.testing.assert_close(total[0] / total[1], expected.double(), atol=1e-6, rtol=0)


def small_model(attention: str) -> AutoModelForCausalLM:
    torch.manual_seed(0)
    fields = {name: value for name, value in QWEN.items() if name != "model_type"}
    config = AutoConfig.for_model(QWEN["model_type"], **fields, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def test_the_schema_of_blocks_is_what_the_reader_expects(tmp_path: Path) -> None:
    assert list(open_rows(numbered(tmp_path, 1))[0]) == blocks_schema(BLOCK_SIZE).names
