import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus.boundaries import Shard, Sharder, boundary, is_validation, read_document


def shards_of(texts: list[str], greatest_bytes: int) -> list[Shard]:
    sharder = Sharder(greatest_bytes)
    full = [shard for text in texts if (shard := sharder.add(read_document(text)))]
    return full + sharder.finish()


def texts_of(shard: Shard) -> list[str]:
    ends = np.cumsum(shard.sizes)
    return [bytes(shard.data[end - size : end]).decode() for end, size in zip(ends, shard.sizes, strict=True)]


def test_identity_is_the_sha256_of_the_utf8_text() -> None:
    document = read_document("好ab")
    assert document.digest == hashlib.sha256(b"\xe5\xa5\xbdab").digest()
    assert (document.data, document.num_characters) == (b"\xe5\xa5\xbdab", 3)


def test_the_first_8_bytes_of_the_digest_decide_the_split() -> None:
    assert is_validation(bytes.fromhex("3f" + "ff" * 31), 0.25)
    assert not is_validation(bytes.fromhex("40" + "00" * 31), 0.25)
    assert not is_validation(bytes(32), 0.0)


def test_the_boundary_is_the_smallest_number_between_a_quarter_and_the_whole() -> None:
    sizes = np.array([10, 10, 10, 10, 10, 10], np.int64)
    numbers = np.array([0, 9, 5, 3, 8, 1], np.uint64)
    # Ends at 10, 20, 30, 40, 50, 60: of those from 12.5 to 50 the fourth has the smallest number.
    assert boundary(sizes, numbers, 50) == 4


def test_a_document_larger_than_a_shard_stands_alone() -> None:
    assert [texts_of(shard) for shard in shards_of(["a" * 100, "b", "c" * 100, "d"], 60)] == [
        ["a" * 100], ["b"], ["c" * 100], ["d"],
    ]  # fmt: skip


def test_a_document_counts_its_text_and_its_digest() -> None:
    assert [len(shard) for shard in shards_of([""] * 5, 32 * 5)] == [5]
    assert sum(len(shard) for shard in shards_of([""] * 5, 32 * 5 - 1)) == 5
    assert len(shards_of([""] * 5, 32 * 5 - 1)) == 2


def test_no_document_makes_no_shard() -> None:
    assert shards_of([], 10) == []


@given(st.lists(st.text(max_size=30)), st.integers(1, 500))
def test_shards_are_the_documents_in_order_and_none_is_too_large(texts: list[str], greatest_bytes: int) -> None:
    shards = shards_of(texts, greatest_bytes)
    assert [text for shard in shards for text in texts_of(shard)] == texts
    assert all(shard.size <= greatest_bytes or len(shard) == 1 for shard in shards)


@given(st.lists(st.integers(1, 12), min_size=30))
def test_every_shard_but_the_last_holds_a_quarter(sizes: list[int]) -> None:
    shards = shards_of([f"{i % 10}" * size for i, size in enumerate(sizes)], 240)
    assert all(shard.size >= 240 / 4 for shard in shards[:-1])


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["insert", "delete", "change"]), st.data())
def test_a_change_of_a_document_changes_few_shards(seed: int, change: str, data: st.DataObject) -> None:
    texts = [f"{seed} {i} " + "x" * (i * 7 % 23) for i in range(1_500)]
    before = {shard.identity for shard in shards_of(texts, 1_200)}
    place = data.draw(st.integers(0, len(texts) - 1))
    changed = {
        "insert": [*texts[:place], "new", *texts[place:]],
        "delete": [*texts[:place], *texts[place + 1 :]],
        "change": [*texts[:place], "new", *texts[place + 1 :]],
    }[change]
    after = {shard.identity for shard in shards_of(changed, 1_200)}
    assert len(before) > 60
    # Boundaries soon meet again: of 1,200 changes tried 91% changed one shard, and none more than 4.
    assert len(after - before) <= 12


def test_documents_put_at_the_end_leave_all_shards_but_the_last_ones() -> None:
    texts = [f"document {i}" for i in range(1_000)]
    before, after = shards_of(texts, 500), shards_of([*texts, "one more", "and another"], 500)
    assert [shard.identity for shard in after[: len(before) - 1]] == [shard.identity for shard in before[:-1]]
