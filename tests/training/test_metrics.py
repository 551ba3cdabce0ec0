from pathlib import Path
from typing import Any

import pytest

from tasks.training.metrics import MetricsFile, bits_per_byte, final_loss, follow, in_words, median_of, read_metrics


def row(step: int, loss: float, num_steps: int = 5) -> dict[str, Any]:
    return {"step": step, "loss": loss, "num_steps": num_steps, "tokens_per_second": step * 10.0}


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    for step in (5, 10, 15):
        first.append(row(step, 1.0))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 20, "lo')
    resumed = MetricsFile(tmp_path / "metrics.jsonl", step=10)
    assert [each["step"] for each in resumed.rows] == [5, 10]
    assert read_metrics(tmp_path / "metrics.jsonl") == resumed.rows


def test_a_run_from_the_start_forgets_everything(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl", step=0).append({"step": 0, "validation_loss": 4.0})
    assert MetricsFile(tmp_path / "metrics.jsonl", step=0).rows == []


def test_the_train_loss_is_the_mean_over_the_last_tenth_of_the_steps() -> None:
    rows = [row(80, 9.0), row(95, 2.0, num_steps=3), row(100, 3.0, num_steps=1), {"step": 100, "validation_loss": 7.0}]
    assert final_loss(rows, num_steps=100) == pytest.approx((2.0 * 3 + 3.0) / 4)
    assert final_loss([row(5, 9.0)], num_steps=100) == 9.0
    assert final_loss([], num_steps=100) is None


def test_the_rate_is_the_median_of_the_reports() -> None:
    assert median_of([row(1, 0), row(2, 0), row(9, 0)], "tokens_per_second") == 20.0
    assert median_of([{"step": 0, "validation_loss": 1.0}], "tokens_per_second") is None


def test_bits_per_byte_of_one_bit_a_token_and_four_bytes_a_token() -> None:
    assert bits_per_byte(0.6931471805599453, num_tokens=100, num_bytes=400) == pytest.approx(0.25)


def test_the_progress_bar_moves_by_steps_from_where_the_run_resumed(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    metrics.append(row(10, 1.0))
    moved: list[int] = []
    told: list[dict[str, Any]] = []
    hear = follow(metrics, "pretrained", 20, moved.append, [told.append])
    hear({"step": 15, "loss": 1.0})
    hear({"step": 15, "validation_loss": 1.0})
    assert moved == [10, 5, 0]
    assert told[0] == {"step": 15, "loss": 1.0}


def test_a_report_is_one_line_of_what_it_has() -> None:
    told = {"step": 5, "loss": 2.34567, "learning_rate": 3e-4, "grad_norm": 0.5, "tokens_per_second": 12345.6, "mfu": 0.341}
    more = {"memory_bytes": 1_230_000_000, "seconds_left": 3700.2}
    assert in_words({**told, **more}, 20) == (
        "step 5 of 20, loss 2.3457, learning rate 0.0003, gradient norm 0.5, 12,346 tokens/s, MFU 34.1%, 1.23 GB, 1:01:40 left"
    )
    assert in_words({"step": 5, "validation_loss": 2.0}, 20) == "step 5 of 20, validation loss 2.0000"


def test_a_line_left_empty_by_a_power_cut_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"\0" * 20 + b'\n{"step": 3}\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]
