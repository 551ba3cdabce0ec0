"""What a process tells of its use of a bucket, and what a claim leaves to the next builder, when something goes wrong."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest

from tasks.store.bucket import Bucket
from tasks.store.claim import CLAIMS, Holder, claimed
from tasks.store.uses import end_uses, use
from tests.store.shared_build import QUICK


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    end_uses()
    monkeypatch.setattr("tasks.store.uses.FIRST_SECONDS", 0.0)
    monkeypatch.setattr("tasks.store.uses.POLL_SECONDS", 0.01)
    yield Bucket(f"file://{tmp_path}", None, QUICK)
    end_uses()


def until(is_so: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def told(bucket: Bucket) -> set[str]:
    found = [bucket.get(one.name) for one in bucket.objects(".leases")]
    return {ref for data in found if data for ref in orjson.loads(data)["refs"]}


def test_what_nobody_foresaw_ends_no_lease(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failed = Bucket.put, []

    def put(self: Bucket, name: str, data: bytes) -> None:
        if not failed:
            failed.append(name)
            raise RuntimeError("can't start new thread")
        real(self, name, data)

    monkeypatch.setattr(Bucket, "put", put)
    use(bucket, "word/1")
    until(lambda: bool(failed))
    use(bucket, "word/2")
    until(lambda: told(bucket) == {"word/1", "word/2"})


def test_a_builder_that_lost_its_claim_unnoticed_leaves_the_other_s_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, folder = Bucket(f"file://{tmp_path}", None, QUICK), f"{CLAIMS}/word-1"
    other = Holder("2", "another cache", "there", 2, 60.0)
    clock = [1000.0]
    monkeypatch.setattr("tasks.store.claim.boot_seconds", lambda: clock[0])
    with claimed(bucket, "word-1", "cache", 60.0):
        clock[0] += 61  # it slept, and ends before its thread has looked
        bucket.put(f"{folder}/1", other.spelled())
    assert [bucket.get(f"{folder}/{term}") is None for term in (0, 1)] == [False, False]
    with claimed(bucket, "word-2", "cache", 60.0):
        clock[0] += 61  # nobody came
    assert list(bucket.objects(f"{CLAIMS}/word-2")) == []
