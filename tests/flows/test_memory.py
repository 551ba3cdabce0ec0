from pathlib import Path

import pytest

from flows.dag import nodes_of
from flows.memory import HEADER, memory_rows, table_row
from flows.plan import plan
from flows.recipe import load_recipe
from tasks.machine import Machine, TrainingSettings
from tasks.store import ArtifactStore
from tasks.training import choice
from tasks.training.deepspeed import preset
from tasks.training.room import Room

QWEN = "seq-monkey-qwen2.5-1.5b"
GB = 10**9


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Two GPUs of 80 GB; the preset is picked."""
    monkeypatch.setattr(choice, "room_here", lambda num_ranks: Room(500 * GB, 80 * GB))
    return Machine(training=TrainingSettings(num_ranks=2, picks_preset=True))


def steps_of(recipe: str, tmp_path: Path, machine: Machine):  # type: ignore[no-untyped-def]
    wanted = {"tokenizer", "blocks", "examples", "pretrained", "finetuned", "adapter"}
    nodes = [node for node in nodes_of(load_recipe(recipe)) if node.name in wanted]
    # Archives would ask their servers, and nothing here is made from them.
    inputs = {node.name: {name: source for name, source in node.inputs.items() if source in wanted} for node in nodes}
    return plan(
        [type(node)(node.name, node.stage, node.spec, inputs[node.name]) for node in nodes], ArtifactStore(tmp_path), machine
    )


def test_every_training_stage_is_told_with_preset_estimate_and_largest_micro_batch(tmp_path: Path, machine: Machine) -> None:
    rows = memory_rows(steps_of(QWEN, tmp_path, machine), machine)
    assert set(rows) == {"pretrained", "finetuned", "adapter"}
    row = rows["pretrained"]
    assert (row["preset"], row["num_ranks"], row["micro_batch_size"] * row["accumulation"]) == ("zero1", 2, 64)
    assert row["largest_micro_batch"] == 64
    assert row["rank_bytes"] <= row["room_bytes"] == 80 * GB
    assert rows["adapter"]["rank_bytes"] < row["rank_bytes"]
    assert len(table_row("pretrained", row)) == len(HEADER)


def test_a_preset_that_is_named_is_kept(tmp_path: Path, machine: Machine) -> None:
    named = Machine(training=TrainingSettings(num_ranks=2, deepspeed_config=preset("zero3")))
    assert memory_rows(steps_of(QWEN, tmp_path, named), named)["finetuned"]["preset"] == "zero3"


def test_a_model_whose_weights_are_not_here_is_left_out(tmp_path: Path, machine: Machine) -> None:
    assert memory_rows(steps_of("seq-monkey-from-qwen2.5-1.5b", tmp_path, machine), machine) == {}
