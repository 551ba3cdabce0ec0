"""Train and validation: a document's own digest decides, so no other document and no growth of the corpus moves it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.corpus.archive import ArchiveSpec, build_archive
from tasks.corpus.boundaries import is_validation, read_document
from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.machine import Machine
from tasks.store import ArtifactStore

Splits = dict[str, list[str]]


@pytest.fixture
def split(store: ArtifactStore, tmp_path: Path) -> Callable[..., Splits]:
    """The texts of both splits of a corpus, as the stage makes them."""

    def build(texts: list[str], **fields: Any) -> Splits:
        path = tmp_path / "corpus.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        archive = build_archive(store, Machine(), ArchiveSpec(url=str(path)))
        spec = DocumentsSpec(**{"validation_fraction": 0.3, "shard_bytes": 2_000, **fields})
        documents = build_documents(store, Machine(), spec, archive=archive)
        return {
            name: [
                text
                for entry in documents.shards(name)
                for text in pq.read_table(documents.shard_file(entry, "documents.parquet"))["text"].to_pylist()
            ]
            for name in ("train", "validation")
        }

    return build


TEXTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=40)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, TEXTS, st.booleans())
def test_documents_appended_or_put_first_move_no_document_between_the_splits(
    split: Callable[..., Splits], texts: list[str], more: list[str], is_first: bool
) -> None:
    # Two documents that lie in different splits, so that neither is ever empty.
    texts = [*texts, "a train text", "validation 7"]
    before, after = split(texts), split([*more, *texts] if is_first else [*texts, *more])
    for name in ("train", "validation"):
        assert set(before[name]) <= set(after[name])


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS)
def test_no_text_is_in_both_splits_however_often_it_stands_in_the_corpus(split: Callable[..., Splits], texts: list[str]) -> None:
    found = split([*texts, "a train text", *texts, *reversed(texts)])
    assert not set(found["train"]) & set(found["validation"])
    assert len(found["train"]) + len(found["validation"]) == 3 * len(texts) + 1


@given(st.text(st.characters(codec="utf-8")), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_keeps_the_validation_documents_and_adds_to_them(text: str, one: float, other: float) -> None:
    digest = read_document(text).digest
    assert not is_validation(digest, min(one, other)) or is_validation(digest, max(one, other))
