"""The cache of a shared store is bounded: what was used longest ago goes, never what a living process has used."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.machine import Machine
from tasks.store import Artifact, SharedStore
from tasks.store.lease import end_lease
from tasks.store.trim import trim
from tests.store.shared_build import BUILDS, QUICK, WordSpec, build_word

HOUR = 3600.0


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    """A bucket with the words a, b, c and d, of 1000 bytes each."""
    BUILDS.clear()
    url = f"file://{tmp_path / 'bucket'}"
    for word in "abcd":
        build_word(SharedStore(url, tmp_path / "builder", patience=QUICK), Machine(), WordSpec(word=word, num_bytes=999))
    end_lease(SharedStore(url, tmp_path / "builder").root)
    return url


def opened(bucket: str, tmp_path: Path, cache_bytes: int | None = None) -> SharedStore:
    return SharedStore(bucket, tmp_path / "cache", patience=QUICK, cache_bytes=cache_bytes)


def read(store: SharedStore, word: str, hours_ago: float = 0) -> Artifact:
    found = build_word(store, Machine(), WordSpec(word=word, num_bytes=999))
    assert found.file("large/bytes").read_bytes() == word.encode() * 999
    if hours_ago:
        lock = store.lock_path("word", found.key)
        then = lock.stat().st_mtime - hours_ago * HOUR
        os.utime(lock, (then, then))
        os.utime(found.folder, (then, then))
    return found


def cached(store: SharedStore) -> list[str]:
    return sorted(path.read_text()[0] for path in store.root.glob("word/*/large/bytes"))


def bytes_of(store: SharedStore) -> int:
    return sum(path.stat().st_size for path in store.root.glob("[!.]*/**/*") if path.is_file())


def test_the_least_recently_used_go_and_come_again_when_they_are_asked_for(bucket: str, tmp_path: Path) -> None:
    store = opened(bucket, tmp_path)
    for hours_ago, word in enumerate("abc", 1):
        read(store, word, hours_ago)
    end_lease(store.root)
    trimmed = trim(store.root, bytes_of(store) - 1)
    assert (trimmed.number, trimmed.kept_bytes, cached(store)) == (1, bytes_of(store), ["a", "b"])
    read(store, "c")
    assert (cached(store), BUILDS) == (["a", "b", "c"], list("abcd"))


def test_a_store_that_is_told_a_bound_keeps_it_by_itself(bucket: str, tmp_path: Path) -> None:
    store = opened(bucket, tmp_path)
    for hours_ago, word in enumerate("abc", 1):
        read(store, word, hours_ago)
    end_lease(store.root)
    most_bytes = bytes_of(store) + 600  # half a copy more than three: a fourth takes the place of one
    bounded = opened(bucket, tmp_path, most_bytes)
    read(bounded, "d")
    assert cached(bounded) == ["a", "b", "d"]
    assert bytes_of(bounded) <= most_bytes


def test_what_this_process_has_used_stays_however_full_it_is(
    bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(bucket, tmp_path, cache_bytes=1)
    held = [read(store, word) for word in "abc"]
    assert cached(store) == ["a", "b", "c"]
    assert "more than its bound" in caplog.text
    assert trim(store.root, 0).number == 0
    end_lease(store.root)
    assert trim(store.root, 0).number == len(held)


READ = """
import sys
from pathlib import Path
from tasks.store import SharedStore
store = SharedStore(sys.argv[1], Path(sys.argv[2]))
store.resolve(sys.argv[3]).file("large/bytes")
print("read", flush=True)
input()
"""


def test_what_another_living_process_has_used_stays(bucket: str, tmp_path: Path) -> None:
    store = opened(bucket, tmp_path)
    word = read(store, "a", hours_ago=5)
    end_lease(store.root)
    command = [sys.executable, "-c", READ, bucket, str(tmp_path / "cache"), word.ref]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert other.stdout
    assert other.stdout.readline() == "read\n"
    assert trim(store.root, 0).number == 0
    other.kill()
    other.communicate()
    assert trim(store.root, 0).number == 1


def test_what_is_uploaded_again_stays_and_so_does_what_is_being_built(bucket: str, tmp_path: Path) -> None:
    store = opened(bucket, tmp_path)
    word = read(store, "a", hours_ago=5)
    staging = store.staging("word", read(store, "b", hours_ago=5).key)
    (staging / "checkpoint").write_text("far")
    end_lease(store.root)
    with store.lock_path("word", word.key).open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert trim(store.root, 0).number == 1
    assert cached(store) == ["a"]
    assert (staging / "checkpoint").read_text() == "far"


def test_only_what_nobody_used_for_so_long_and_a_try_changes_nothing(bucket: str, tmp_path: Path) -> None:
    store = opened(bucket, tmp_path)
    read(store, "a", hours_ago=5)
    read(store, "b", hours_ago=1)
    end_lease(store.root)
    tried = trim(store.root, 0, unused_seconds=2 * HOUR, dry_run=True)
    assert (tried.number, cached(store)) == (1, ["a", "b"])
    assert trim(store.root, 0, unused_seconds=2 * HOUR) == tried
    assert cached(store) == ["b"]
    assert not (store.root / ".trimmed").exists()


def test_a_range_of_what_is_trimmed_at_this_moment_comes_from_the_bucket(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = build_word(opened(bucket, tmp_path), Machine(), WordSpec(word="a", num_bytes=999))
    monkeypatch.setattr("tasks.store.fetched.is_whole", lambda path, entry: True)  # as it was until now
    assert found.read("large/bytes", 3, 4) == b"aaaa"
