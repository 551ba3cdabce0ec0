"""Tables on the whole run, from hand-made artifacts."""

from typing import Any

import pytest

from tasks.report import tables
from tasks.report.tables import Table
from tasks.store import Artifact, ArtifactStore
from tests.report.artifacts import FakeSpec, corpus_artifacts, every_artifact, fake, held_out


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return every_artifact(ArtifactStore(tmp_path_factory.mktemp("store")))


def test_a_record_names_its_cells() -> None:
    assert Table(("a", "b"), (("1", "2"),)).records() == [{"a": "1", "b": "2"}]


def test_stages_name_the_nodes_they_are_made_from(artifacts: dict[str, Artifact]) -> None:
    made_from = {row[0]: row[1] for row in tables.stages_table(artifacts).rows}
    assert made_from["archive"] == ""
    assert made_from["examples"] == "conversations, tokenizer, held_out"
    assert made_from["adapter"] == "pretrained, examples"
    assert list(made_from) == list(artifacts)


def test_keys_are_cut_to_what_a_person_types(artifacts: dict[str, Artifact]) -> None:
    row = tables.stages_table(artifacts).rows[1]
    assert row[2] == artifacts["documents"].key[:12]
    assert row[3] == artifacts["documents"].content[:12]


def test_accuracy_stands_beside_the_baseline() -> None:
    validation = {"loss": 5.4321, "bits_per_byte": 1.8}
    evaluations = {
        "pretrained": {"validation": None, "held_out": held_out(412, "x")},
        "finetuned": {"validation": validation, "held_out": held_out(861, "x")},
        "adapter": {"validation": None, "held_out": None},
    }
    assert tables.accuracy_table(evaluations).rows == (
        ("pretrained", "–", "–", "41.2%", "39.2% – 43.2%", "−12.4 points"),
        ("finetuned", "5.432", "1.800", "86.1%", "84.1% – 88.1%", "+32.5 points"),
        ("adapter", "–", "–", "–", "–", "–"),
        ("majority baseline", "–", "–", "53.6%", "–", "–"),
    )


def test_likelihoods_stand_side_by_side_and_are_absent_where_nothing_was_measured() -> None:
    evaluations: dict[str, dict[str, Any]] = {
        "pretrained": {"held_out": {"loss": 4.04, "label_accuracy": None}, "examples": None, "harness": None},
        "finetuned": {"held_out": {"loss": 0.5, "label_accuracy": 0.9}, "examples": {"loss": 0.75}, "harness": {"law.acc": 0.25}},
    }
    table = tables.likelihood_table(evaluations)
    assert table
    assert table.columns == ("Figure", "pretrained", "finetuned")
    assert table.rows == (
        ("loss, held-out answers", "4.040", "0.500"),
        ("loss, validation examples", "–", "0.750"),
        ("likeliest label right", "–", "90.0%"),
        ("law.acc", "–", "0.2500"),
    )
    assert tables.likelihood_table({"pretrained": {"held_out": None}}) is None


def test_confusion_has_a_row_an_expected_response() -> None:
    table = tables.confusion_table(held_out(861, "x"))
    assert table
    assert table.columns == ("Expected", "answered 正面", "answered 负面", "answered (other)")
    assert table.rows == (("正面", "461", "75", "0"), ("负面", "60", "400", "4"))


def test_open_questions_have_no_confusion() -> None:
    assert tables.confusion_table({"confusion": None}) is None


def test_versions_that_differ_are_both_told(artifacts: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> None:
    store = ArtifactStore(tmp_path_factory.mktemp("other"))
    older = fake(store, "blocks", FakeSpec(produced_by={"packages": {"numpy": "1.0"}}))
    rows = dict(tables.packages_table([*corpus_artifacts(store).values(), older]).rows)
    assert rows["numpy"].endswith(", 1.0")
