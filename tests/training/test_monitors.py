"""Monitors: what each keeps of a run, and that none can stop it."""

import logging
from pathlib import Path
from typing import Any

import orjson
import pytest

from tasks.errors import SettingsError
from tasks.training import monitors
from tasks.training.monitors import Run, check_monitors, watched

ROWS = [{"step": step, "loss": 4.0 - step, "num_steps": 1, "learning_rate": 0.5} for step in (1, 2, 3)]


def keep(name: str, folder: Path, rows: list[dict[str, Any]], step: int = 0) -> None:
    with watched([name], Run(folder, "pretrained 0123", step)) as hear:
        for row in rows:
            hear(row)


def test_json_lines_hold_every_report_once_across_a_resume(tmp_path: Path) -> None:
    keep("jsonl", tmp_path, ROWS)
    keep("jsonl", tmp_path, ROWS[2:], step=2)
    assert [orjson.loads(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()] == ROWS


def test_tensorboard_holds_a_scalar_for_every_metric_and_step_and_takes_back_what_is_trained_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keep("tensorboard", tmp_path, ROWS)
    again = [{**row, "loss": 9.0} for row in ROWS[2:]]
    keep("tensorboard", tmp_path, again, step=2)
    read = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == ["learning_rate", "loss"]
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 3.0), (2, 2.0), (3, 9.0)]


@pytest.mark.slow
def test_swanlab_keeps_an_offline_run_and_calls_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "online")
    monkeypatch.setenv("SWANLAB_API_KEY", "planted-key")
    keep("swanlab", tmp_path, ROWS)
    assert not caplog.records
    (kept,) = (tmp_path / "swanlab").glob("run-*/run-*.swanlab")
    assert b"learning_rate" in kept.read_bytes()
    assert all(b"planted-key" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


class Broken:
    def __init__(self, run: Run) -> None: ...

    def write(self, row: dict[str, Any]) -> None:
        raise OSError("no space left")

    def close(self) -> None:
        raise AssertionError("a monitor that failed is not closed")


def test_a_monitor_that_fails_says_so_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(monitors.MONITORS, "tensorboard", Broken)
    with caplog.at_level(logging.WARNING), watched(["tensorboard", "jsonl"], Run(tmp_path, "run", 0)) as hear:
        for row in ROWS:
            hear(row)
    assert [record.getMessage() for record in caplog.records] == [
        "monitor tensorboard: OSError: no space left; training goes on without it"
    ]
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 3


def test_a_monitor_that_cannot_be_opened_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with watched(["jsonl"], Run(tmp_path / "file" / "folder", "run", 0)) as hear:
        hear(ROWS[0])
    assert "monitor jsonl: NotADirectoryError" in caplog.text


def test_a_process_that_reads_no_more_does_not_hold_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitors.sys, "executable", str(program))
        patch.setattr(monitors, "CLOSE_SECONDS", 0.01)
        with watched(["swanlab"], Run(tmp_path, "run", 0)) as hear:
            for _ in range(2000):  # more than a pipe holds
                hear(ROWS[0])
    assert "its process reads no more (Resource temporarily unavailable)" in caplog.text


def test_a_monitor_that_there_is_not_or_is_not_installed_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_monitors(["jsonl"])
    with pytest.raises(SettingsError, match="no monitor 'wandb'; there are jsonl, tensorboard, swanlab"):
        check_monitors(["wandb"])
    monkeypatch.setattr(monitors, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"swanlab is not installed; pip install 'seqmill\[swanlab\]'"):
        check_monitors(["swanlab"])
