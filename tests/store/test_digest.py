import math
from pathlib import Path

import pytest

from tasks.store import canonical_json, digest_bytes, digest_file, digest_json, write_atomically
from tasks.store.digest import DigestMemory

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_digest_of_nothing_is_the_published_sha256_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert digest_bytes(b"") == digest_file(tmp_path / "empty") == EMPTY


def test_canonical_json_has_one_spelling_whatever_the_order() -> None:
    assert canonical_json({"b": 1.5, "a": ["好", True]}) == canonical_json({"a": ["好", True], "b": 1.5})
    assert canonical_json({"b": 1, "a": ["好", None]}) == '{"a":["好",null],"b":1}'.encode()


def test_none_is_a_value_like_any_other() -> None:
    assert digest_json({"a": 1, "new": None}) != digest_json({"a": 1})


@pytest.mark.parametrize("value", [{1, 2}, Path("x"), math.nan, math.inf, {1: 2}, b"x", object()])
def test_a_value_without_a_stable_spelling_is_refused_and_located(value: object) -> None:
    with pytest.raises(TypeError, match=r"\$\.spec\[0\].* has no stable spelling"):
        canonical_json({"spec": [value]})


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    memory, path, reads = DigestMemory(tmp_path / "notes"), tmp_path / "file", []
    path.write_bytes(b"one")
    assert memory.digest(path, reads.append) == memory.digest(path, reads.append) == digest_bytes(b"one")
    assert reads == [3]
    path.write_bytes(b"four")
    assert memory.digest(path, reads.append) == digest_bytes(b"four")
    assert reads == [3, 4]


def test_a_note_cut_short_is_read_again(tmp_path: Path) -> None:
    memory, path = DigestMemory(tmp_path / "notes"), tmp_path / "file"
    path.write_bytes(b"one")
    memory.digest(path)
    next((tmp_path / "notes").iterdir()).write_text('{"state": [')
    assert memory.digest(path) == digest_bytes(b"one")


def test_write_atomically_leaves_no_partial_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "deep" / "file", b"x")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "note").mkdir()
    with pytest.raises(OSError, match="note"):
        write_atomically(tmp_path / "note", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
