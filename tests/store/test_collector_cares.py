"""What the collector must not take, although nothing names it: unfinished work, and what it cannot be sure of."""

import fcntl
import threading
from pathlib import Path

import orjson
import pytest

from tasks.errors import StoreError
from tasks.machine import Machine
from tasks.store import ArtifactStore
from tasks.store.gc import Marking, collect
from tasks.store.lease import clock_ns, end_lease
from tasks.store.notes import FolderNotes
from tasks.store.pins import pin, recorded_run, runs, unfinished_since
from tasks.store.reach import Reach
from tests.store.test_gc import DAY, aged, built, gone, held
from tests.store.test_stage import WordSpec, build_word


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def stopped(store: ArtifactStore, recipe: str, until: str = "model") -> Path:
    """A run that was killed in the building of a model, and its staging with a checkpoint."""

    def run() -> None:
        with recorded_run(store.notes, recipe, [until], None):
            (staging / "checkpoint").write_text("far")
            raise KeyboardInterrupt

    staging = store.staging("word", store.keys("letters")[0])
    with pytest.raises(KeyboardInterrupt):
        run()
    return staging


def finished(store: ArtifactStore, recipe: str, until: str = "model") -> None:
    with recorded_run(store.notes, recipe, [until], None):
        pass


def after_days(store: ArtifactStore, days: float) -> None:
    """As if everything, the runs too, had been left alone for so long."""
    aged(store, days)
    for path in store.root.glob(".runs/*.json"):
        run = orjson.loads(path.read_bytes())
        path.write_bytes(orjson.dumps({**run, "began": run["began"] - days * DAY}))


def test_a_training_that_was_killed_on_friday_is_there_on_monday(store: ArtifactStore) -> None:
    built(store, "abc")
    pin(store.notes, store.resolve("letters"))
    staging = stopped(store, "mine")
    after_days(store, 3)
    assert [gone(store, days=days).taken for days in (1, 1)] == [(), ()]
    assert (staging / "checkpoint").read_text() == "far"


def test_it_goes_when_the_same_recipe_came_to_the_same_end_without_it(store: ArtifactStore) -> None:
    built(store, "abc")
    pin(store.notes, store.resolve("letters"))
    staging = stopped(store, "mine")
    after_days(store, 3)
    finished(store, "yours")
    finished(store, "mine", until="documents")
    assert gone(store).taken == ()
    finished(store, "mine")
    assert [taken.what for taken in gone(store).taken] == ["staging of word"]
    assert not staging.exists()


def test_a_run_that_nobody_goes_on_with_for_a_month_holds_nothing(store: ArtifactStore) -> None:
    built(store, "abc")
    stopped(store, "mine")
    now = clock_ns(store.root) / 1e9
    assert unfinished_since(runs(store.notes), now) is not None
    assert unfinished_since(runs(store.notes), now + 31 * DAY) is None


def test_branches_that_end_at_once_are_all_noted(tmp_path: Path) -> None:
    names = [f"node{number}" for number in range(40)]
    with recorded_run(FolderNotes(tmp_path), "mine", ["end"], None) as record:
        threads = [threading.Thread(target=record, args=(name, f"word/{name}")) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(runs(FolderNotes(tmp_path))[0]["refs"]) == sorted(names)


@pytest.mark.parametrize("name", [".pins/word-1.json", ".runs/1.json"])
def test_a_record_that_cannot_be_read_stops_the_collector(store: ArtifactStore, name: str) -> None:
    built(store, "abc", "mine")
    path = store.root / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"ref": "wo')
    aged(store)
    before = held(store)
    with pytest.raises(StoreError, match=rf"{path.name}: cannot be read .*what it names would be collected; mend or delete it"):
        gone(store)
    assert held(store) == before


def test_a_clock_that_goes_ahead_collects_nothing(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's files are dated by a file server; this machine's clock may be days from it."""
    built(store, "xyz")
    built(store, "abc", "mine")
    end_lease(store.root)
    monkeypatch.setattr("time.time_ns", lambda: 4_000_000_000 * 10**9)
    assert gone(store, days=1).taken == ()


def test_what_is_built_anew_since_it_was_looked_at_is_not_taken(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    built(store, "abc", "mine")
    word = build_word(store, Machine(), WordSpec(word="other"))
    aged(store)
    real = Marking.moved

    def moved_while_it_is_built(self: Marking) -> list[tuple[str, str]]:
        listed = real(self)
        assert (word.ref, word.ref) in listed
        lock = store.lock_path("word", word.key).open("a+")
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.held = lock  # type: ignore[attr-defined]
        return listed

    monkeypatch.setattr(Marking, "moved", moved_while_it_is_built)
    collect(store, keep_last=1, grace_seconds=DAY)
    assert word.path.exists()


def test_without_the_gate_nothing_is_collected(store: ArtifactStore) -> None:
    built(store, "xyz")
    built(store, "abc", "mine")
    aged(store)
    gate = store.root / ".leases" / "gate"
    gate.unlink()
    gate.mkdir()  # as little to be opened for writing as another user's file
    with pytest.raises(StoreError, match=r"cannot be collected .*nothing was touched"):
        gone(store)
    assert len(store.keys("letters")) == 2


def test_a_file_system_without_locks_is_told_with_the_way_out(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.root.mkdir()

    def refuse(handle: int, mode: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreError, match=r"locks no files .*name it as file://"):
        build_word(store, Machine(), WordSpec(word="a"))


def test_what_is_committed_once_its_kind_was_read_is_followed_too(store: ArtifactStore) -> None:
    built(store, "abc")
    reach = Reach(store.root)
    reach.follow(f"letters/{key}" for key in store.keys("letters"))
    assert len(reach) == 2 + 3
    reach.follow([built(store, "xyz").ref])
    assert (len(reach), reach.unread) == (4 + 6, set())


def test_runs_are_in_the_order_of_the_store_s_clock(store: ArtifactStore) -> None:
    """One of two machines that share the folder is a year ahead."""
    old = built(store, "abc", "mine")
    (path,) = store.root.glob(".runs/*.json")
    record = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps({**record, "started": "2999-01-01T00:00:00.000000+00:00"}))
    new = built(store, "xyz", "mine")
    aged(store)
    assert "letters" in {taken.what.partition("/")[0] for taken in gone(store).taken}
    assert [store.load("letters", one.key) is None for one in (old, new)] == [True, False]


def test_a_run_of_an_earlier_release_began_when_it_says(store: ArtifactStore) -> None:
    built(store, "abc", "mine")
    (path,) = store.root.glob(".runs/*.json")
    then = "2020-01-01T00:00:00.000000+00:00"
    path.write_bytes(orjson.dumps({"recipe": "mine", "started": then, "refs": {}}))
    assert [run["started"] for run in runs(store.notes)] == [then]
