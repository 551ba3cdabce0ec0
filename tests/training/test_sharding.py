"""One step is one step however it is shared out: over ranks, micro batches and ZeRO stages, with unevenly supervised rows."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tasks.machine import Machine, TrainingSettings
from tasks.store import ArtifactStore, Work
from tasks.training.deepspeed import preset
from tasks.training.launch import run_worker
from tasks.training.model import completed_config
from tasks.training.optimization import OptimizationSpec
from tasks.training.run import Rows, Start, make_plan
from tests.training.adapting import plan_of
from tests.training.small_inputs import BLOCK_SIZE, QWEN, VOCAB_SIZE, InputSpec, build_examples

CONFIG = completed_config({**QWEN, "attention_dropout": 0.0}, VOCAB_SIZE, 0)
ADAPTERS = (("lora", "zero2"), ("lora", "zero3"), ("pfeiffer", "zero2"), ("pfeiffer", "zero3"), ("p_tuning", "zero2"))
SPEC = OptimizationSpec(global_batch_size=4, num_steps=6, learning_rate=1e-2, precision="fp32", logging_steps=1)


class Runs:
    """Plans of the same training, each shared out in another way, carried out in one launch."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = ArtifactStore(root / "store")
        self.examples = build_examples(self.store, Machine(), InputSpec())
        self.plans: list[Any] = []
        self.metrics: list[dict[str, Any]] = []

    def add(self, name: str, start: Start, settings: TrainingSettings) -> None:
        folder = self.root / name
        folder.mkdir()
        work = Work(self.store, Machine(training=settings), folder, None)
        train, validation = self.examples.file("train.arrow"), self.examples.file("validation.arrow")
        self.plans.append(make_plan(work, SPEC, name, Rows([train], [validation], BLOCK_SIZE, VOCAB_SIZE, "data"), start))

    def run(self, num_ranks: int) -> None:
        path = self.root / "plans.json"
        path.write_text(json.dumps({"plans": [asdict(plan) for plan in self.plans]}))
        settings = TrainingSettings()
        run_worker("tests.training.many_plans", path, num_ranks=num_ranks, settings=settings, on_metrics=self.metrics.append)

    def losses(self) -> list[list[float]]:
        """Training losses of each plan, and its validation loss."""
        rows = [row.get("loss", row.get("validation_loss")) for row in self.metrics]
        size = len(rows) // len(self.plans)
        return [rows[start : start + size] for start in range(0, len(rows), size)]


def test_the_loss_is_the_mean_over_the_tokens_of_the_global_batch_however_shared_out(tmp_path: Path) -> None:
    new = Start(config=CONFIG, folder=None, attention="sdpa", vocab_size=64)
    (tmp_path / "alone").mkdir()
    alone = Runs(tmp_path / "alone")
    alone.add("4x1", new, TrainingSettings(num_ranks=1, micro_batch_size=4))
    alone.add("1x4", new, TrainingSettings(num_ranks=1, micro_batch_size=1))
    alone.run(num_ranks=1)

    (tmp_path / "both").mkdir()
    both = Runs(tmp_path / "both")
    for name in ("zero3", "zero2", "zero0", "zero3_offload"):  # zero3 first: it needs the ranks' group before all else
        both.add(name, new, TrainingSettings(num_ranks=2, micro_batch_size=2, deepspeed_config=preset(name)))
    folder = tmp_path / "alone" / "4x1"
    for method, zero in ADAPTERS:
        base = Start(config=None, folder=folder, attention="sdpa", vocab_size=64, adapter=plan_of(method, folder))
        both.add(f"{method}-{zero}", base, TrainingSettings(num_ranks=2, micro_batch_size=1, deepspeed_config=preset(zero)))
    both.run(num_ranks=2)

    expected, *others = alone.losses() + both.losses()[:4]
    assert len(expected) == 7
    for losses in others:
        assert losses == pytest.approx(expected, abs=2e-5)
    adapters = both.losses()[4:]
    assert adapters[0] == pytest.approx(adapters[1], abs=2e-5)
    assert adapters[2] == pytest.approx(adapters[3], abs=2e-5)
    assert_whole(tmp_path / "both" / "lora-zero3" / "adapter_model.safetensors", like="lora-zero2")
    assert_whole(tmp_path / "both" / "pfeiffer-zero3" / "adapter_model.safetensors", like="pfeiffer-zero2")
    assert load_file(tmp_path / "both" / "p_tuning-zero2" / "adapter_model.safetensors")["prompt_embeddings"].shape == (4, 32)
    assert_whole(tmp_path / "both" / "zero3" / "model.safetensors", like="zero2")


def assert_whole(path: Path, like: str) -> None:
    """ZeRO-3 has gathered every weight, as no stage below it needs to."""
    found, expected = load_file(path), load_file(path.parent.parent / like / path.name)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in expected.items()}
    assert all(tensor.numel() for tensor in found.values())
