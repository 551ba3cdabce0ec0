import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.corpus import duplicates
from tasks.corpus.duplicates import open_seen
from tasks.errors import StoreError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a few digests reach: a filter that says "perhaps" often, two digests a query, three waiting."""
    monkeypatch.setattr(duplicates, "FILTER_BITS", 1 << 6)
    monkeypatch.setattr(duplicates, "LOOKUP_ROWS", 2)
    monkeypatch.setattr(duplicates, "WAITING_DIGESTS", 3)


def digests(text: str) -> list[bytes]:
    return [hashlib.sha256(letter.encode()).digest() for letter in text]


def test_the_first_of_equal_digests_is_told_within_a_batch_and_across(tmp_path: Path) -> None:
    with open_seen(tmp_path) as seen:
        assert seen.firsts(digests("aba")) == [True, True, False]
        assert seen.firsts(digests("cb")) == [True, False]
        assert seen.firsts([]) == []
        assert seen.firsts(digests("abcd")) == [False, False, False, True]


@given(st.lists(st.text(max_size=20)))
def test_it_agrees_with_a_set(batches: list[str]) -> None:
    known = set()
    with TemporaryDirectory() as folder, open_seen(Path(folder)) as seen:
        for batch in batches:
            expected = []
            for letter in batch:
                expected.append(letter not in known)
                known.add(letter)
            assert seen.firsts([hashlib.sha256(letter.encode("utf-8", "surrogatepass")).digest() for letter in batch]) == expected


def test_what_a_crash_left_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "seen.sqlite").write_bytes(b"torn")
    with open_seen(tmp_path) as seen:
        assert seen.firsts(digests("a")) == [True]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"seen\.sqlite: .*full.*; free room"), open_seen(tmp_path) as seen:  # noqa: PT012
        seen.connection.execute("PRAGMA max_page_count=3")
        for start in range(0, 2_000, 10):
            seen.firsts([hashlib.sha256(b"%d" % number).digest() for number in range(start, start + 10)])
