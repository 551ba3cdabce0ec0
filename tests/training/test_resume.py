"""Training under the real launcher, ZeRO-2, dropout and accumulation on: broken off and run again equals never broken off.

By kill -9 of everything and a torn checkpoint; by SIGTERM, as a preempted machine gets it. Two ranks: test_sharding.
"""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import StoppedError
from tasks.machine import Machine, TrainingSettings
from tasks.store import Artifact
from tasks.training.checkpoints import checkpoint_folders, step_of, verified
from tasks.training.meter import MEASURED
from tasks.training.model import ModelSpec
from tasks.training.pretrained import PretrainedSpec, build_pretrained
from tests.training.small_inputs import QWEN, blocks_and_tokenizer

ALONE = TrainingSettings(num_ranks=1, micro_batch_size=2)  # two micro batches are accumulated

# Pretrains until the rank reports step 13, and then dies as by kill -9 of its parent.
DIE_AT_13 = """
import os, sys
from pathlib import Path
from tests.training.test_resume import pretrained, spec

def die(row):
    if row["step"] == 13:
        os.kill(os.getpid(), 9)

pretrained(Path(sys.argv[1]), spec(checkpoint_steps=5), die)
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


# A validation after every step: the one that a run told to stop had no time for is made up for.
UNBROKEN = spec(checkpoint_steps=1000, evaluation_steps=1)


def pretrained(root: Path, spec: PretrainedSpec, on_metrics: Any = None) -> Artifact:
    store, blocks, tokenizer = blocks_and_tokenizer(root)
    return build_pretrained(store, Machine(training=ALONE, on_metrics=on_metrics), spec, blocks=blocks, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return pretrained(tmp_path_factory.mktemp("whole"), UNBROKEN)


def reports(model: Artifact) -> list[dict[str, Any]]:
    rows = model.manifest.produced_by["metrics"]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def losses(model: Artifact) -> list[dict[str, Any]]:
    return [row for row in reports(model) if "loss" in row]


def test_killed_torn_and_resumed_equals_never_killed(whole: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [row["step"] for row in losses(whole)] == list(range(1, 21))
    assert all(row["grad_norm"] > 0 for row in losses(whole))
    killed = subprocess.run([sys.executable, "-c", DIE_AT_13, str(tmp_path)], check=False)
    assert killed.returncode == -9
    store, *_ = blocks_and_tokenizer(tmp_path)
    folders = checkpoint_folders(store.staging("pretrained", whole.key) / ".scratch" / "checkpoints")
    # On a busy machine the ranks may have come further than what their parent had heard when it died.
    newest, older = [folder for folder in folders if verified(folder)[1] is None][:2]
    assert step_of(older) == step_of(newest) - 5 >= 5
    tear(newest)

    with caplog.at_level(logging.INFO):
        resumed = pretrained(tmp_path, spec(checkpoint_steps=5))
    assert f"{newest.name}: passed over: " in caplog.text
    assert f"pretrained: resumed from {older}, step {step_of(older)} of 20" in caplog.text
    assert resumed.manifest.produced_by["resumed_from"] == step_of(older)
    assert losses(resumed) == losses(whole)
    assert resumed.content == whole.content
    assert resumed.stats == whole.stats


def tear(checkpoint: Path) -> None:
    """Cut a file short, as a full disk or a lost page does, behind a manifest that looks whole."""
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size - 1)


def test_told_to_stop_and_run_again_equals_never_told(whole: Artifact, tmp_path: Path) -> None:
    def tell(row: dict[str, Any]) -> None:
        if row["step"] == 4 and "loss" in row:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match=r"^pretrained: stopped after step \d+, whose checkpoint is kept; run again"):
        pretrained(tmp_path, UNBROKEN, tell)
    assert signal.getsignal(signal.SIGTERM) is before
    again = pretrained(tmp_path, UNBROKEN)
    assert 4 <= again.manifest.produced_by["resumed_from"] < 20
    assert reports(again) == reports(whole)
    assert again.content == whole.content
