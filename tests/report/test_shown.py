"""A model and an evaluation alone, as the Prefect UI shows them."""

from pathlib import Path

from tasks.report.corpus import shown_tables
from tasks.report.shown import evaluated, evaluation_tables, training_markdown
from tasks.store import ArtifactStore
from tests.report.artifacts import FakeSpec, every_artifact, fake


def test_a_training_run_is_its_facts_and_its_curves(tmp_path: Path) -> None:
    artifacts = every_artifact(ArtifactStore(tmp_path))
    shown = training_markdown(artifacts["pretrained"])
    assert shown.startswith("# Pretraining\n\n")
    assert "- **Steps**: 160" in shown
    for title in ("Loss", "Learning rate", "Throughput"):
        assert f"## {title}\n\n![{title}](data:image/png;base64," in shown
    assert training_markdown(artifacts["adapter"]).count("data:image/png") == 1


def test_an_evaluation_is_told_under_the_model_that_it_measures(tmp_path: Path) -> None:
    artifacts = every_artifact(ArtifactStore(tmp_path))
    assert evaluated(artifacts["evaluation_finetuned"]) == "finetuned"
    tables = evaluation_tables(artifacts["evaluation_adapter"])
    assert list(tables) == ["evaluation-adapter", "evaluation-adapter-answers", "evaluation-adapter-samples"]
    assert [row["Model"] for row in tables["evaluation-adapter"]] == ["adapter", "majority baseline"]


def test_the_mask_is_told_by_split(tmp_path: Path) -> None:
    split = {"num_examples": 10, "num_rows": 2, "num_tokens": 400, "num_supervised_tokens": 100, "num_answers_proven": 12}
    ledger = {"num_conversations": 10, "num_examples": 10, "num_rows": 2, "num_tokens": 400, "num_supervised_tokens": 100}
    stats = {**ledger, "train": split, "validation": {**split, "num_examples": 0}}
    examples = fake(ArtifactStore(tmp_path), "examples", FakeSpec(stats=stats))
    assert shown_tables(examples)["examples-mask"] == [
        {
            "Split": "train", "Examples": "10", "Rows": "2", "Tokens": "400", "Carry loss": "100", "Share": "25.0%",
            "Answers proven": "12",
        }
    ]  # fmt: skip
