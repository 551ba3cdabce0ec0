"""Adapters beside each other, on hand-made artifacts."""

from typing import Any

import orjson
import pytest

from tasks.machine import Machine
from tasks.report.comparison import COLUMNS, NO_VALUE, comparison_table
from tasks.report.page import page_of
from tasks.report.report import ReportSpec, build_report
from tasks.store import Artifact, ArtifactStore
from tests.report.artifacts import FakeSpec, every_artifact, fake, held_out

COUNTS = {"num_conversations": 9, "num_examples": 9, "num_rows": 3, "num_tokens": 900, "num_supervised_tokens": 90}


def measured(accuracy: float, rate: float) -> FakeSpec:
    told = {"validation": None, "examples": None, "held_out": held_out(round(1000 * accuracy), "负面"), "samples": []}
    stats = {"held_out_accuracy": accuracy, "held_out_loss": 1 - accuracy}
    return FakeSpec(files={"evaluation.json": orjson.dumps(told).decode()}, stats=stats, produced_by={"decoding": {
        "tokens_per_second": rate}})  # fmt: skip


def adapter(num_trained: int, num_virtual: int = 0, rates: tuple[float, ...] = (100.0, 409.6, 819.2)) -> FakeSpec:
    stats: dict[str, Any] = {"num_parameters": 1_000_000, "num_trainable_parameters": num_trained}
    rows = [{"step": 1 + place, "loss": 2.0, "tokens_per_second": rate} for place, rate in enumerate(rates)]
    return FakeSpec(
        files={"adapter_model.safetensors": "x" * 1500, "merged-model.txt": "x"},
        stats={**stats, **({"num_virtual_tokens": num_virtual} if num_virtual else {})},
        produced_by={"metrics": rows, "peak_memory_bytes": 1_230_000_000},
        global_batch_size=8,
    )


@pytest.fixture
def artifacts(tmp_path: Any) -> dict[str, Artifact]:
    """A base with positions and two adapters on it, and one on the finetuned model, which nobody has evaluated."""
    store = ArtifactStore(tmp_path)
    examples = fake(store, "examples", FakeSpec(stats={"block_size": 512, **COUNTS}))
    config = '{"max_position_embeddings": 2048}'
    files = {"config.json": config, "model.safetensors": "y" * 4000}
    base = fake(store, "pretrained", FakeSpec(files=files, stats={"num_parameters": 980_000}))
    tuned = fake(store, "finetuned", FakeSpec(files={"model.safetensors": "z"}), base=base)
    made = {
        "lora": fake(store, "adapter", adapter(20_000), base=base, examples=examples),
        "prefix": fake(store, "adapter", adapter(5_000, num_virtual=16), base=base, examples=examples),
        "other": fake(store, "adapter", FakeSpec(stats={"num_parameters": 10}), base=tuned, examples=examples),
    }
    scores = {
        "pretrained": fake(store, "evaluation", measured(0.0, 50.0), model=base),
        "adapter_lora": fake(store, "evaluation", measured(0.75, 40.0), model=base, adapter=made["lora"]),
        "adapter_prefix": fake(store, "evaluation", measured(0.5, 48.0), model=base, adapter=made["prefix"]),
    }
    adapters = {f"adapter_{name}": artifact for name, artifact in made.items()}
    evaluations = {f"evaluation_{name}": artifact for name, artifact in scores.items()}
    return {"pretrained": base, "examples": examples, "finetuned": tuned, **adapters, **evaluations}


def test_each_base_stands_above_what_was_put_onto_it(artifacts: dict[str, Artifact]) -> None:
    table = comparison_table(artifacts)
    assert table
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in table.rows}
    assert list(rows) == ["pretrained, as it is", "lora", "prefix", "finetuned, as it is", "other"]
    assert tuple(rows["lora"].values()) == (
        "lora", "20.0 k", "2.0%", "1.50 kB", "1.23 GB", "7.50 s", "0.250", "75.0%", "40", "80.0%", "2,048",
    )  # fmt: skip
    assert (rows["pretrained, as it is"]["File"], rows["pretrained, as it is"]["Speed"]) == ("4.00 kB", NO_VALUE)
    assert (rows["prefix"]["Speed"], rows["prefix"]["Context"]) == ("96.0%", "2,032")
    assert set(list(rows["other"].values())[3:]) == {NO_VALUE}


def test_where_no_adapters_are_compared_there_is_no_table(tmp_path: Any) -> None:
    whole = every_artifact(ArtifactStore(tmp_path))
    assert comparison_table(whole) is None


def test_the_page_tells_the_best_of_them_and_how_each_was_trained(artifacts: dict[str, Artifact], tmp_path: Any) -> None:
    shown = {name: artifact for name, artifact in artifacts.items() if not name.endswith("other")}
    page = page_of(shown, None)
    assert {figure.label: figure.value for figure in page.figures}["Best accuracy, compared"] == "75.0%"
    assert [training.title for training in page.compared_trainings] == ["lora", "prefix"]
    report = build_report(ArtifactStore(tmp_path), Machine(), ReportSpec(), **shown)
    assert "<h2>Adapters compared</h2>" in report.file("report.html").read_text()
    assert orjson.loads(report.file("tables.json").read_bytes())["comparison"][1]["Method"] == "lora"
