import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.corpus import duplicates
from tasks.corpus.duplicates import Seen, open_seen
from tasks.errors import StoreError


def test_the_first_of_equal_digests_is_told_within_a_batch_and_across(tmp_path: Path) -> None:
    with open_seen(tmp_path) as seen:
        assert seen.firsts([b"a", b"b", b"a"]) == [True, True, False]
        assert seen.firsts([b"c", b"b"]) == [True, False]
        assert seen.firsts([]) == []


@given(st.lists(st.lists(st.binary(min_size=1, max_size=1))))
def test_it_agrees_with_a_set(batches: list[list[bytes]]) -> None:
    connection, known = sqlite3.connect(":memory:"), set()
    connection.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
    seen = Seen(connection)
    for batch in batches:
        expected = []
        for digest in batch:
            expected.append(digest not in known)
            known.add(digest)
        assert seen.firsts(batch) == expected
    connection.close()


def test_batches_larger_than_a_query_are_looked_up_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "LOOKUP_ROWS", 2)
    digests = [bytes([i]) for i in range(7)]
    with open_seen(tmp_path) as seen:
        assert seen.firsts(digests) == [True] * 7
        assert seen.firsts(digests) == [False] * 7


def test_what_a_crash_left_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "seen.sqlite").write_bytes(b"torn")
    with open_seen(tmp_path) as seen:
        assert seen.firsts([b"a"]) == [True]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"seen\.sqlite: .*full.*; free room"), open_seen(tmp_path) as seen:  # noqa: PT012
        seen.connection.execute("PRAGMA max_page_count=3")
        seen.firsts([i.to_bytes(32, "big") for i in range(2_000)])
