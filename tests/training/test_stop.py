"""SIGTERM, as a preempted machine gets it: the run saves a checkpoint and ends; run again, it equals one never told to stop."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import StoppedError
from tasks.machine import Machine, TrainingSettings
from tasks.store import Artifact
from tasks.training.meter import MEASURED
from tasks.training.pretrained import build_pretrained
from tests.training.small_inputs import blocks_and_tokenizer
from tests.training.test_resume import spec

ALONE = TrainingSettings(num_ranks=1)
# A validation after every step: the one that a run told to stop had no time for is made up for.
SPEC = spec(checkpoint_steps=1000, evaluation_steps=1)


def reports(model: Artifact) -> list[dict[str, Any]]:
    rows = model.manifest.produced_by["metrics"]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def test_told_to_stop_and_run_again_equals_never_told(tmp_path: Path) -> None:
    store, blocks, tokenizer = blocks_and_tokenizer(tmp_path / "whole")
    whole = build_pretrained(store, Machine(training=ALONE), SPEC, blocks=blocks, tokenizer=tokenizer)

    def tell(row: dict[str, Any]) -> None:
        if row["step"] == 4 and "loss" in row:
            os.kill(os.getpid(), signal.SIGTERM)

    store, blocks, tokenizer = blocks_and_tokenizer(tmp_path / "stopped")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match=r"^pretrained: stopped after step \d+, whose checkpoint is kept; run again"):
        build_pretrained(store, Machine(training=ALONE, on_metrics=tell), SPEC, blocks=blocks, tokenizer=tokenizer)
    assert signal.getsignal(signal.SIGTERM) is before
    again = build_pretrained(store, Machine(training=ALONE), SPEC, blocks=blocks, tokenizer=tokenizer)
    assert 4 <= again.manifest.produced_by["resumed_from"] < 20
    assert reports(again) == reports(whole)
    assert again.content == whole.content
