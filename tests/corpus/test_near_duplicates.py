from pathlib import Path
from random import Random

import numpy as np
import pytest
from pydantic import ValidationError

from tasks.corpus import journal, near_duplicates, reader, scratch_log
from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.corpus.near_duplicates import NearDuplicates, ngram_hashes, open_near_seen, signatures
from tasks.machine import Machine
from tasks.store import ArtifactStore

from .conftest import json_lines, store_archive
from .test_documents import dying

SPEC = NearDuplicates(threshold=0.7)


def text_of(seed: int, length: int = 400) -> str:
    random = Random(seed)
    return "".join(chr(random.randint(0x4E00, 0x4F00)) for _ in range(length))


def with_change(text: str, place: int) -> str:
    return text[:place] + "改了" + text[place + 2 :]


def jaccard(one: str, other: str) -> float:
    sets = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_signatures_estimate_the_similarity_of_the_sets_of_n_grams() -> None:
    one = text_of(1)
    for num_changes in (1, 10, 30):
        other = one
        for place in range(0, 400, 400 // num_changes):
            other = with_change(other, place)
        rows = signatures([one, other], NearDuplicates(num_permutations=1024))
        assert abs(float(np.mean(rows[0] == rows[1])) - jaccard(one, other)) < 0.1


def test_a_text_shorter_than_an_n_gram_is_its_only_one() -> None:
    assert [len(ngram_hashes(text, 5)) for text in ("", "a", "abcde", "abcdef")] == [1, 1, 1, 2]
    assert ngram_hashes("ab", 5) != ngram_hashes("ba", 5)


@pytest.mark.parametrize("waiting", [1, 20_000])
def test_the_later_of_two_that_are_nearly_one_is_dropped_in_memory_and_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    monkeypatch.setattr(near_duplicates, "WAITING_DOCUMENTS", waiting)
    one, other = text_of(1), text_of(2)
    with open_near_seen(tmp_path, SPEC) as seen:
        assert seen.firsts([one, with_change(one, 100), other]) == [True, False, True]
        assert seen.firsts([]) == []
        assert seen.firsts([with_change(other, 7), text_of(3), with_change(one, 300)]) == [False, True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["near-kept"]  # for a build that goes on; its scratch goes with it


def test_a_document_that_shares_a_band_and_is_not_near_enough_is_kept(tmp_path: Path) -> None:
    one = text_of(1)
    other = one[:280] + text_of(9, 120)  # a similarity of a little over a half
    with open_near_seen(tmp_path, NearDuplicates(threshold=0.9, num_bands=64)) as seen:
        assert seen.firsts([one, other]) == [True, True]
    with open_near_seen(tmp_path, NearDuplicates(threshold=0.4, num_bands=64)) as seen:
        assert seen.firsts([one, other]) == [True, False]


def test_the_ledger_counts_them_apart_from_exact_ones(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    texts = [text_of(1), text_of(1), with_change(text_of(1), 50), text_of(2)]
    spec = DocumentsSpec(validation_fraction=0.0, deduplicate=True, near_duplicates=SPEC)
    stats = build_documents(store, Machine(), spec, archive=store_archive(store, json_lines(texts))).stats
    assert (stats["num_documents"], stats["num_duplicates"], stats["num_near_duplicates"]) == (2, 1, 1)


def test_a_memory_that_goes_on_is_as_it_was_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch_log, "READ_BYTES", 1200)  # two signatures at a time
    one, other, late = text_of(1), text_of(2), text_of(3)
    with open_near_seen(tmp_path, SPEC) as seen:
        assert seen.firsts([one, other, with_change(one, 9), text_of(4), text_of(5)]) == [True, True, False, True, True]
        num_bytes = seen.settle()
        assert seen.firsts([late]) == [True]
        seen.settle()
    with open_near_seen(tmp_path, SPEC, num_bytes) as seen:
        assert seen.num_kept == 4
        assert seen.firsts([with_change(other, 100), late, with_change(late, 5)]) == [False, True, False]


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_killed_build_goes_on_and_counts_as_an_unbroken_one(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, deduplicate: bool
) -> None:
    texts = [text_of(seed, 300) for seed in range(120)]
    near = [with_change(text, 100) for text in texts[::3]]
    data = json_lines([*texts[:60], *near[:20], *texts[60:], *near, *texts[::10]])
    spec = DocumentsSpec(validation_fraction=0.2, shard_bytes=9_000, deduplicate=deduplicate, near_duplicates=SPEC)
    other = ArtifactStore(store.root.parent / "other")
    expected = build_documents(other, Machine(), spec, archive=store_archive(other, data))
    monkeypatch.setattr(journal, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4_000)
    starts: list[int] = []
    for after in (4, 12, 1_000):
        dying(store.root, starts, after, monkeypatch)
        try:
            found = build_documents(store, Machine(), spec, archive=store_archive(store, data))
        except KeyboardInterrupt:
            assert after < 1_000
    assert (found.content, found.stats) == (expected.content, expected.stats)
    assert expected.stats["num_near_duplicates"] >= 20
    assert 1 == starts[0] < starts[1] < starts[2]


def test_golden_signature() -> None:
    """Another signature keeps other documents: the revision of documents rises with it."""
    expected = [1073724990, 109516536, 1087644984, 1658208895, 1065204609, 914884120, 410950868, 357365155]
    found = signatures(["春眠不觉晓，处处闻啼鸟。"], NearDuplicates(num_permutations=8, num_bands=1))
    assert found.tolist() == [expected]


@pytest.mark.parametrize("fields", [{"num_bands": 7}, {"threshold": 0}, {"num_permutations": 4}, {"ngram_characters": 0}])
def test_a_spec_that_cannot_be_meant_is_refused(fields) -> None:
    with pytest.raises(ValidationError):
        NearDuplicates(**fields)
