"""Records of runs go once no collection can need them any more: of a folder as of a bucket."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.store import ArtifactStore
from tasks.store.collect import collect_store
from tasks.store.gc import Collected
from tasks.store.lease import end_lease
from tasks.store.notes import FolderNotes, Note, Notes
from tasks.store.pins import KEPT_LAST, RECORD_SECONDS, last_refs, pin, recorded_run, runs, spent, unfinished_since
from tests.store.shared_build import folder_or_bucket, spell

DAY = 86_400.0
NOW = 1.8e9


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    return folder_or_bucket(request.param, tmp_path)


def record_files(store: ArtifactStore) -> list[Path]:
    root = Path(store.address.removeprefix("file://"))
    return sorted(root.glob(".runs/*.json"))


def run(store: ArtifactStore, word: str, days: float, recipe: str = "mine") -> Path:
    """A run of so many days ago; its record's file."""
    before = set(record_files(store))
    with recorded_run(store.notes, recipe, ["letters"], None) as record:
        record("letters", spell(store, word).ref)
    (path,) = set(record_files(store)) - before
    value, then = orjson.loads(path.read_bytes()), path.stat().st_mtime - days * DAY
    started = datetime.fromtimestamp(then, UTC).isoformat(timespec="microseconds")
    path.write_bytes(orjson.dumps({**value, "started": started, "began": then}))
    os.utime(path, (then, then))
    return path


def gc(store: ArtifactStore, keep_last: int = 1, dry_run: bool = False) -> Collected:
    return collect_store(store, keep_last=keep_last, grace_seconds=DAY, dry_run=dry_run)


def told(collected: Collected) -> dict[str, int]:
    return {gone.what: gone.number for gone in collected.deleted}


def test_what_a_later_run_found_too_is_said_once_and_older_records_go(store: ArtifactStore) -> None:
    nightly = [run(store, "abc", days) for days in (90, 60, 31, 29, 1)]
    assert told(gc(store, dry_run=True)) == {"records of runs": 3}
    assert record_files(store) == sorted(nightly)
    collected = gc(store)
    assert told(collected) == {"records of runs": 3}
    assert collected.deleted_bytes > 300
    assert record_files(store) == sorted(nightly[3:])
    assert told(gc(store)) == {}


def test_the_last_of_a_recipe_however_old_keep_what_they_name(store: ArtifactStore) -> None:
    words = "abcdefghijklm"
    files = [run(store, word, 300 - number) for number, word in enumerate(words)]
    run(store, "xyz", 400, "yours")
    gc(store)
    assert record_files(store) == sorted([*files[-KEPT_LAST:], *(path for path in record_files(store) if "yours" in path.name)])
    assert len(record_files(store)) == KEPT_LAST + 1
    gc(store, keep_last=12)
    assert len(last_refs(runs(store.notes), 12)) == KEPT_LAST + 1


def test_who_keeps_more_than_that_keeps_their_records(store: ArtifactStore) -> None:
    files = [run(store, word, 300 - number) for number, word in enumerate("abcdefghijklm")]
    assert told(gc(store, keep_last=20)) == {}
    assert record_files(store) == sorted(files)


def test_a_run_that_went_on_lately_stays_recorded(store: ArtifactStore) -> None:
    old = run(store, "abc", 90)
    run(store, "abc", 1)
    os.utime(old)
    assert told(gc(store)) == {}


def test_a_record_that_is_written_while_it_is_looked_at_stays(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old = run(store, "abc", 90)
    run(store, "abc", 1)
    real = type(store.notes).remove_unchanged

    def went_on(self: Any, note: Note) -> bool:
        os.utime(old)
        return real(self, note)

    monkeypatch.setattr(type(store.notes), "remove_unchanged", went_on)
    assert told(gc(store)) == {}
    assert old.exists()


def test_a_collection_that_keeps_less_takes_no_record_that_another_needs(store: ArtifactStore) -> None:
    run(store, "abc", 90)
    kept = spell(store, "xyz")
    pin(store.notes, kept)
    end_lease(store.root)
    assert told(gc(store, keep_last=0)) == {}  # another gc may keep more
    assert store.find(kept.kind, kept.key)


REFS = st.sampled_from([f"word/{letter * 64}" for letter in "abcdef"])
RUNS = st.lists(
    st.fixed_dictionaries(
        {
            "recipe": st.sampled_from(["mine", "yours"]),
            "until": st.sampled_from([["a"], ["b"]]),
            "overrides": st.sampled_from([{}, {"x": 1}]),
            "state": st.sampled_from(["finished", "failed", "running"]),
            "refs": st.dictionaries(st.sampled_from(["one", "two"]), REFS),
            "days": st.floats(0, 100),
            "later": st.floats(0, 40),
        }
    ),
    max_size=30,
)


@given(recorded=RUNS, keep_last=st.integers(0, 3))
def test_what_is_left_says_the_same_as_all_of_them(recorded: list[dict[str, Any]], keep_last: int) -> None:
    def note(number: int, value: dict[str, Any]) -> Note:
        began = NOW - value["days"] * DAY
        started = (datetime.fromtimestamp(NOW, UTC) - timedelta(days=value["days"])).isoformat(timespec="microseconds")
        return Note(f".runs/{number}.json", {**value, "started": started}, min(began + value["later"] * DAY, NOW), 1)

    notes = sorted((note(*one) for one in enumerate(recorded)), key=lambda one: one.value["started"])
    gone = spent(notes, NOW, keep_last, kept_last=2)
    left = [one.value for one in notes if one not in gone]
    values = [one.value for one in notes]
    for number in range(max(keep_last, 2) + 1):
        assert last_refs(left, number) == last_refs(values, number)
    assert unfinished_since(left, NOW) == unfinished_since(values, NOW)
    assert all(one.written < NOW - RECORD_SECONDS for one in gone)


def test_a_record_is_removed_once(tmp_path: Path) -> None:
    notes: Notes = FolderNotes(tmp_path)
    notes.write(".runs/1.json", {"recipe": "mine"})
    (note,) = notes.read_all(".runs")
    assert (notes.remove_unchanged(note), notes.remove_unchanged(note)) == (True, False)
