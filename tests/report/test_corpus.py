"""Tables and plots on the corpus, from hand-made artifacts."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.machine import Machine
from tasks.report import corpus
from tasks.schemas import QUARANTINE
from tasks.store import Artifact, ArtifactStore, Built, Work, stage
from tests.report.artifacts import FakeSpec, every_artifact, fake


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return every_artifact(ArtifactStore(tmp_path_factory.mktemp("store")))


def test_lines_add_up_and_those_of_nothing_are_left_out(artifacts: dict[str, Artifact]) -> None:
    assert corpus.lines_table(artifacts["documents"]).rows == (
        ("documents", "52,850", "98.0%"),
        ("duplicates of a document before", "1,079", "2.0%"),
        ("blank", "1", "<0.1%"),
        ("quarantined", "3", "<0.1%"),
        ("lines read", "53,933", "100.0%"),
    )


def lines(tmp_path: Path, **stats: Any) -> list[tuple[str, ...]]:
    documents = fake(ArtifactStore(tmp_path), "documents", FakeSpec(stats={"num_documents": 50, "num_lines": 100, **stats}))
    return [row[:2] for row in corpus.lines_table(documents).rows]


def test_what_was_filtered_is_told_by_each_reason_in_its_place(tmp_path: Path) -> None:
    told = {"num_near_duplicates": 10, "num_filtered": 30, "filtered_by": {"min_characters": 25, "my.module:keep": 5}}
    assert lines(tmp_path, **told, num_blank=10) == [
        ("documents", "50"),
        ("nearly a document before", "10"),
        ("filtered: min_characters", "25"),
        ("filtered: my.module:keep", "5"),
        ("blank", "10"),
        ("lines read", "100"),
    ]


def test_what_was_filtered_is_one_count_where_no_reason_is_told(tmp_path: Path) -> None:
    assert lines(tmp_path, num_filtered=50) == [("documents", "50"), ("filtered", "50"), ("lines read", "100")]


def test_quarantine_counts_reasons_and_shows_bytes_that_are_not_utf8(artifacts: dict[str, Artifact]) -> None:
    found = corpus.quarantine_tables(artifacts["documents"])
    assert found
    assert found[0].rows == (("not JSON", "2"), ("not UTF-8", "1"))
    assert found[1].rows[1] == ("212", "not UTF-8", '{"text": "\ufffd\ufffd"}')


def test_bad_lines_beyond_twenty_are_counted(tmp_path: Path) -> None:
    @stage("documents", revision=1)
    def build(work: Work, spec: FakeSpec) -> Built:
        rows = [{"line": line, "reason": "not JSON", "excerpt": b"{"} for line in range(1, 31)]
        pq.write_table(pa.Table.from_pylist(rows, schema=QUARANTINE), work.folder / "quarantine.parquet")
        return Built()

    found = corpus.quarantine_tables(build(ArtifactStore(tmp_path), Machine(), FakeSpec()))
    assert found
    assert found[0].rows == (("not JSON", "30"),)
    assert [row[0] for row in found[1].rows] == [str(line) for line in range(1, 21)]
    assert found[1].note == "and 10 more"


def test_packing_shows_every_token(artifacts: dict[str, Artifact]) -> None:
    table = corpus.packing_table(artifacts["blocks"])
    assert table.rows[1] == ("validation", "53,690", "26", "53,248", "442")


def test_splits_show_bytes_a_token_and_both_together(artifacts: dict[str, Artifact]) -> None:
    table = corpus.splits_table(artifacts)
    assert table.columns == ("Split", "Documents", "Text", "Characters", "Tokens", "Bytes per token", "Shards")
    assert table.rows[0] == ("train", "52,310", "21.4 MB", "7.30 M", "5,130,412", "4.17", "24")
    assert table.rows[2] == ("both", "52,850", "21.6 MB", "7.38 M", "5,184,102", "4.17", "25")


def test_splits_have_the_columns_of_what_is_there(artifacts: dict[str, Artifact]) -> None:
    alone = corpus.splits_table({"documents": artifacts["documents"]})
    assert alone.columns == ("Split", "Documents", "Text", "Characters", "Shards")
    tokens = corpus.splits_table({"tokens": artifacts["tokens"]})
    assert tokens.columns == ("Split", "Documents", "Text", "Tokens", "Bytes per token", "Shards")


def test_shards_beyond_twenty_are_counted(artifacts: dict[str, Artifact]) -> None:
    table = corpus.shards_table(artifacts)
    assert len(table.rows) == 20
    assert table.note == "and 5 more"
    assert table.columns == ("Shard", "Key", "Documents", "Text", "Characters", "Tokens", "On disk")
    assert table.rows[0][0] == "train/00000"
    assert table.rows[0][5:] == ("213,000", "22 B")  # a documents shard's file and a tokens shard's, of 11 bytes each


def test_shards_are_summed_for_every_stage_that_has_some(artifacts: dict[str, Artifact]) -> None:
    assert corpus.shard_sizes_table(artifacts).rows == (
        ("documents", "25", "280 B", "–", "11 B", "16 B"),
        ("tokens", "25", "280 B", "5,625,000", "11 B", "16 B"),
    )


def test_an_artifact_without_a_shard_has_an_empty_table(artifacts: dict[str, Artifact]) -> None:
    assert corpus.shards_table({"blocks": artifacts["blocks"]}).rows == ()


def test_conversations_show_the_share_that_carries_loss(artifacts: dict[str, Artifact]) -> None:
    table = corpus.conversations_table(artifacts["examples"])
    assert table.rows[-1] == ("conversations read", "15,711", "100.0%")
    assert "6.5% of the tokens carry loss" in table.note


def test_the_corpus_in_a_line(artifacts: dict[str, Artifact]) -> None:
    assert list(corpus.corpus_facts(artifacts)) == [
        ("Documents", "52,850"),
        ("Text", "21.6 MB"),
        ("Tokens", "5.18 M"),
        ("Bytes per token", "4.17"),
        ("Blocks", "2,531 × 2,048 ids"),
    ]


@pytest.mark.parametrize(
    ("encoders", "told"),
    [
        ({"fastokens": 25}, "fastokens"),
        ({"fastokens": 24, "tokenizers": 1}, "fastokens (24 of 25 shards), tokenizers (1 of 25 shards)"),
    ],
)
def test_the_encoders_are_told(tmp_path: Path, artifacts: dict[str, Artifact], encoders: dict[str, int], told: str) -> None:
    spec = FakeSpec(stats=artifacts["tokens"].stats, produced_by={"encoders": encoders})
    tokens = fake(ArtifactStore(tmp_path), "tokens", spec)
    assert dict(corpus.corpus_facts({"tokens": tokens}))["Encoded by"] == told


@pytest.mark.parametrize(
    ("kind", "tables"),
    [
        (
            "documents",
            ["documents-ledger", "documents-splits", "documents-quarantined", "documents-shard-sizes", "documents-shards"],
        ),
        ("tokens", ["tokens-splits", "tokens-shard-sizes", "tokens-shards"]),
        ("blocks", ["blocks-ledger"]),
        ("examples", ["examples-ledger"]),
    ],
)
def test_every_corpus_artifact_has_tables_of_its_own_by_keys_that_prefect_takes(
    artifacts: dict[str, Artifact], kind: str, tables: list[str]
) -> None:
    shown = corpus.shown_tables(artifacts[kind])
    assert list(shown) == tables
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in shown)
    assert all(rows for rows in shown.values())


def test_the_lengths_are_a_picture_inside_the_text(artifacts: dict[str, Artifact]) -> None:
    text = corpus.shown_markdown(artifacts["documents"])
    assert text.startswith(
        "# documents\n\n- **Documents**: 52,850\n- **Text**: 21.6 MB\n\n## Document length\n\n![Document length]"
    )
    assert text.count("(data:image/png;base64,iVBOR") == 2
    assert corpus.shown_markdown(artifacts["tokens"]) == "# tokens\n\n- **Tokens**: 5.18 M\n- **Bytes per token**: 4.17"
    assert corpus.shown_markdown(artifacts["examples"]) == "# examples"
