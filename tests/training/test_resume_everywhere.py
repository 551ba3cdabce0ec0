"""Killed and resumed equals never killed, for every training stage and more ZeRO stages: minutes long."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.machine import Machine, TrainingSettings
from tasks.store import Artifact
from tasks.training.adapter import AdapterSpec, LoraSpec, build_adapter
from tasks.training.deepspeed import preset
from tasks.training.finetuned import FinetunedSpec, build_finetuned
from tasks.training.model import ModelSpec
from tasks.training.pretrained import PretrainedSpec, build_pretrained
from tests.training.small_inputs import QWEN, InputSpec, blocks_and_tokenizer, build_examples

COMMON: dict[str, Any] = {"global_batch_size": 4, "num_steps": 12, "learning_rate": 1e-2, "logging_steps": 1}
LORA = LoraSpec(target_modules=("q_proj", "embed_tokens"), dropout=0.1)

DIE_AT_7 = """
import os, sys
from tests.training.test_resume_everywhere import train

def die(row):
    if row["kind"] == sys.argv[2] and row["step"] == 7:
        os.kill(os.getpid(), 9)

train(sys.argv[1], sys.argv[2], sys.argv[3], die)
"""


def train(root: str, kind: str, zero: str, on_metrics: Any = None) -> Artifact:
    """Train up to ``kind``."""
    machine = Machine(training=TrainingSettings(num_ranks=2, deepspeed_config=preset(zero)), on_metrics=on_metrics)
    store, blocks, tokenizer = blocks_and_tokenizer(Path(root))
    examples = build_examples(store, machine, InputSpec())
    fields = {**COMMON, "checkpoint_steps": 3}
    spec = PretrainedSpec(**fields, precision="fp32", model=ModelSpec(config=QWEN))
    base = build_pretrained(store, machine, spec, blocks=blocks, tokenizer=tokenizer)
    if kind == "finetuned":
        base = build_finetuned(store, machine, FinetunedSpec(**fields, precision="bf16"), base=base, examples=examples)
    if kind == "adapter":
        adapter = AdapterSpec(**fields, precision="bf16", gradient_checkpointing=True, lora=LORA)
        return build_adapter(store, machine, adapter, base=base, examples=examples)
    return base


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "zero"), [("pretrained", "zero3"), ("finetuned", "zero1"), ("adapter", "zero2"), ("adapter", "zero3")]
)
def test_killed_and_resumed_equals_never_killed(tmp_path: Path, kind: str, zero: str) -> None:
    whole = train(str(tmp_path / "whole"), kind, zero)
    command = [sys.executable, "-c", DIE_AT_7, str(tmp_path / "killed"), kind, zero]
    assert subprocess.run(command, check=False).returncode == -9
    resumed = train(str(tmp_path / "killed"), kind, zero)
    assert resumed.manifest.produced_by["resumed_from"] == 6
    assert resumed.content == whole.content
    losses = [[row.get("loss") for row in model.manifest.produced_by["metrics"]] for model in (whole, resumed)]
    assert losses[0] == losses[1]
