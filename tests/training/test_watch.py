"""The watch over the loss: which step ends a run, at which rows, and that a resumed run ends at the same."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from tasks.errors import WorkerError
from tasks.machine import Machine, TrainingSettings
from tasks.training.model import ModelSpec
from tasks.training.order import RowOrder, Share
from tasks.training.pretrained import PretrainedSpec, build_pretrained
from tasks.training.saving import CheckpointWriter, Ranks
from tasks.training.trainer import SteppedTrainer
from tasks.training.watch import Halt, LossWatch
from tests.training.small_inputs import QWEN, blocks_and_tokenizer


class OneRank(Ranks):
    def __init__(self) -> None:
        self.several, self.group = False, None


def watch(jump: float | None = 3.0) -> LossWatch:
    return LossWatch(Share(0, 1, micro_batch_size=2, accumulation=2), RowOrder(8, seed=0), jump)


def judged(watched: LossWatch, step: int, *losses: tuple[float, float], norm: float | None = 1.0) -> Halt | None:
    """Each step of two micro batches, whose losses are told in halves, as Trainer adds them up."""
    for pair in losses:
        for loss in pair:
            watched.note_loss(torch.tensor(loss / 2))
        watched.note_norm(norm)
    return watched.judge(step, OneRank())


def rows_of(step: int) -> list[int]:
    return [RowOrder(8, seed=0).row(position) for position in range((step - 1) * 4, step * 4)]


def test_the_step_and_the_micro_batch_that_are_no_number_are_found_among_those_reported_together() -> None:
    halt = judged(watch(), 4, (2.0, 2.0), (2.0, math.nan), (math.nan, math.nan), (1.0, 1.0))
    assert halt == Halt(2, "the loss is not a number", rows_of(2)[2:], is_whole_batch=False)


def test_a_gradient_norm_that_is_no_number_ends_the_run_at_all_rows_of_the_step() -> None:
    assert judged(watch(), 1, (2.0, 2.0), norm=math.inf) == Halt(1, "the gradient norm is not a number", rows_of(1), True)
    assert judged(watch(), 1, (2.0, 2.0), norm=None) is None


def test_a_loss_above_the_bound_ends_the_run_once_there_is_a_median() -> None:
    early = watch()
    assert judged(early, 2, (2.0, 2.0), (9.0, 9.0)) is None
    late = watch()
    assert judged(late, 5, *[(2.0, 2.0)] * 5) is None
    assert judged(late, 6, (5.9, 5.9)) is None
    halt = judged(late, 7, (2.0, 12.0))
    assert halt == Halt(7, "the loss is 7, more than 3 times 2, the median of the last 6 steps", rows_of(7)[2:], False)
    assert judged(watch(jump=None), 7, *[(2.0, 2.0)] * 6, (90.0, 90.0)) is None


def test_a_step_that_ends_a_run_is_not_among_the_losses_that_are_kept() -> None:
    watched = watch()
    judged(watched, 6, *[(2.0, 2.0)] * 5, (90.0, 90.0))
    assert watched.known == [2.0] * 5


class Reporting(SteppedTrainer):
    """As much of a trainer as reports take, on one rank, after ``step`` steps."""

    def __init__(self, folder: Path, step: int) -> None:
        self.share, self.num_rows, self.ranks, self.watch = Share(0, 1, 2, 2), 8, OneRank(), watch()
        self.plan = {"label": "pretrained", "halt_path": str(folder / "halt.json")}
        self.state = TrainerState(global_step=step)
        self.writer = CheckpointWriter(folder, {}, self.ranks)

    def is_world_process_zero(self) -> bool:
        return True


def test_a_validation_that_is_no_number_is_told_by_the_step_that_spoilt_the_weights(tmp_path: Path) -> None:
    trainer = Reporting(tmp_path, step=3)
    for losses in ((2.0, 2.0), (math.nan, 2.0), (math.nan, math.nan)):
        for loss in losses:
            trainer.watch.note_loss(torch.tensor(loss / 2))
        trainer.watch.note_norm(1.0)
    with pytest.raises(WorkerError, match=r"^pretrained: step 2: the loss is not a number$"):
        trainer.log({"validation_loss": math.nan})
    assert json.loads((tmp_path / "halt.json").read_text())["rows"] == rows_of(2)[:2]
    with pytest.raises(WorkerError, match=r"^pretrained: the validation loss is not a number after step 3; lower"):
        Reporting(tmp_path, step=3).log({"validation_loss": math.nan})


def spec(**fields: Any) -> PretrainedSpec:
    given = {"learning_rate": 3.0, "max_grad_norm": 1e9, "precision": "fp32", "warmup_steps": 12, **fields}
    model = ModelSpec(config=QWEN)
    return PretrainedSpec(global_batch_size=4, num_steps=20, model=model, logging_steps=3, checkpoint_steps=4, **given)


class Ended:
    """A run that the watch ended: what was said, where, and after which checkpoint."""

    def __init__(self, root: Path, num_ranks: int = 1, **fields: Any) -> None:
        store, blocks, tokenizer = blocks_and_tokenizer(root)
        machine = Machine(training=TrainingSettings(num_ranks=num_ranks))
        with pytest.raises(WorkerError) as caught:
            build_pretrained(store, machine, spec(**fields), blocks=blocks, tokenizer=tokenizer)
        self.message = str(caught.value)
        (path,) = store.root.glob(".staging/pretrained/*/.scratch/halt.json")
        self.halt = json.loads(path.read_text())
        self.step = self.halt["step"]
        self.kept = (self.step - 1) // 4 * 4


def test_a_run_whose_loss_jumps_ends_at_that_step_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    ended = Ended(tmp_path, loss_jump=1.3)
    assert ended.kept >= 4, "the test is to have a checkpoint before its jump"
    assert ended.message.startswith(f"pretrained: step {ended.step}: the loss is ")
    assert "more than 1.3 times " in ended.message
    assert f"checkpoint-{ended.kept} is kept: lower learning_rate" in ended.message
    assert len(ended.halt["references"]) == len(ended.halt["rows"]) > 0
    names = {reference["shard"] or reference["file"] for row in ended.halt["references"] for reference in row}
    assert names <= {"train/00000", "train/00001", "train-tail.arrow"}


@pytest.mark.slow
def test_run_again_it_goes_on_from_the_checkpoint_and_ends_at_the_same_step_and_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Ended(tmp_path, loss_jump=1.3)
    with caplog.at_level(logging.INFO):
        second = Ended(tmp_path, loss_jump=1.3)
    assert f"step {first.kept} of 20" in caplog.text
    assert (second.message, second.halt) == (first.message, first.halt)


@pytest.mark.slow
def test_two_ranks_whose_loss_is_no_number_end_at_the_step_that_is_the_first_to_have_none(tmp_path: Path) -> None:
    ended = Ended(tmp_path, num_ranks=2, learning_rate=1e38, warmup_steps=0, precision="bf16")
    assert ended.step <= 3
    assert "is not a number, at row " in ended.message
    assert "no checkpoint is kept" in ended.message
    assert "loss_jump" not in ended.message
