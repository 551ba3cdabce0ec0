"""Training under the real launcher, two ranks, ZeRO-2, dropout on: killed and resumed equals never killed, to the bit."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.machine import Machine, TrainingSettings
from tasks.store import Artifact
from tasks.training.checkpoints import checkpoint_folders
from tasks.training.model import ModelSpec
from tasks.training.pretrained import PretrainedSpec, build_pretrained
from tests.training.small_inputs import QWEN, blocks_and_tokenizer

RANKS = TrainingSettings(num_ranks=2, micro_batch_size=1)  # two micro batches are accumulated

# Pretrains until the ranks report step 13, and then dies as by kill -9 of everything's parent.
DIE_AT_13 = """
import os, sys
from pathlib import Path
from tasks.machine import Machine
from tests.training.small_inputs import blocks_and_tokenizer
from tests.training.test_resume import RANKS, spec
from tasks.training.pretrained import build_pretrained

def die(row):
    if row["step"] == 13:
        os.kill(os.getpid(), 9)

store, blocks, tokenizer = blocks_and_tokenizer(Path(sys.argv[1]))
build_pretrained(store, Machine(training=RANKS, on_metrics=die), spec(checkpoint_steps=5), blocks=blocks, tokenizer=tokenizer)
"""


def spec(checkpoint_steps: int, evaluation_steps: int | None = None) -> PretrainedSpec:
    return PretrainedSpec(
        global_batch_size=4,
        num_steps=20,
        learning_rate=1e-2,
        warmup_steps=2,
        weight_decay=0.1,
        precision="bf16",
        model=ModelSpec(config=QWEN),
        logging_steps=1,
        checkpoint_steps=checkpoint_steps,
        evaluation_steps=evaluation_steps,
    )


def losses(model: Artifact) -> list[tuple[int, float, float]]:
    rows = model.manifest.produced_by["metrics"]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def test_killed_torn_and_resumed_equals_never_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, blocks, tokenizer = blocks_and_tokenizer(tmp_path / "whole")
    whole = build_pretrained(store, Machine(training=RANKS), spec(1000, 7), blocks=blocks, tokenizer=tokenizer)
    assert [step for step, _, _ in losses(whole)] == list(range(1, 21))

    store, blocks, tokenizer = blocks_and_tokenizer(tmp_path / "killed")
    killed = subprocess.run([sys.executable, "-c", DIE_AT_13, str(tmp_path / "killed")], check=False)
    assert killed.returncode == -9
    newest, older = checkpoint_folders(store.staging("pretrained", whole.key) / ".scratch" / "checkpoints")
    assert (newest.name, older.name) == ("checkpoint-10", "checkpoint-5")
    tear(newest)

    with caplog.at_level(logging.INFO):
        resumed = build_pretrained(store, Machine(training=RANKS), spec(5), blocks=blocks, tokenizer=tokenizer)
    assert "checkpoint-10: passed over: " in caplog.text
    assert f"pretrained: resumed from {older}, step 5 of 20" in caplog.text
    assert resumed.manifest.produced_by["resumed_from"] == 5
    assert losses(resumed) == losses(whole)
    assert resumed.content == whole.content
    assert resumed.stats == whole.stats


def tear(checkpoint: Path) -> None:
    """Cut a file short, as a full disk or a lost page does, behind a manifest that looks whole."""
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size - 1)
