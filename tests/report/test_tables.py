"""Tables, from hand-made artifacts."""

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


def test_lines_add_up_and_those_of_nothing_are_left_out(artifacts: dict[str, Artifact]) -> None:
    assert tables.lines_table(artifacts["documents"]).rows == (
        ("documents", "52,850", "98.0%"),
        ("duplicates of a document before", "1,079", "2.0%"),
        ("blank", "1", "<0.1%"),
        ("quarantined", "3", "<0.1%"),
        ("lines read", "53,933", "100.0%"),
    )


def test_quarantine_counts_reasons_and_shows_bytes_that_are_not_utf8(artifacts: dict[str, Artifact]) -> None:
    found = tables.quarantine_tables(artifacts["documents"])
    assert found
    assert found[0].rows == (("not JSON", "2"), ("not UTF-8", "1"))
    assert found[1].rows[1] == ("not UTF-8", '{"text": "\ufffd\ufffd"}', "212")


def test_packing_shows_every_token(artifacts: dict[str, Artifact]) -> None:
    table = tables.packing_table(artifacts["blocks"])
    assert table.rows[1] == ("validation", "53,690", "26", "53,248", "442")


def test_splits_show_bytes_a_token(artifacts: dict[str, Artifact]) -> None:
    train = tables.splits_table(artifacts).rows[0]
    assert train == ("train", "52,310", "21.4 MB", "7.30 M", "5.13 M", "4.17", "24")


def test_splits_without_tokens_leave_dashes(artifacts: dict[str, Artifact]) -> None:
    assert tables.splits_table({"documents": artifacts["documents"]}).rows[0][4:6] == ("–", "–")


def test_shards_beyond_twenty_are_counted(artifacts: dict[str, Artifact]) -> None:
    table = tables.shards_table(artifacts)
    assert len(table.rows) == 20
    assert table.note == "and 5 more"
    assert table.rows[0][0] == "train/00000"
    assert table.rows[0][5] == "213,000"


def test_conversations_show_the_share_that_carries_loss(artifacts: dict[str, Artifact]) -> None:
    table = tables.conversations_table(artifacts["examples"])
    assert table.rows[-1] == ("conversations read", "15,711", "100.0%")
    assert "6.5% of the tokens carry loss" in table.note


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
