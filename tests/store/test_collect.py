"""What the collector takes of a bucket and what it leaves, on a folder that speaks like one: two caches are two machines."""

import os
import secrets
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.errors import StoreError
from tasks.machine import Machine
from tasks.store import Artifact, SharedStore
from tasks.store.collect import collect_bucket
from tasks.store.fate import condemn, decide, sentence_of
from tasks.store.gc import Collected
from tasks.store.pins import pin, recorded_run, unpin
from tasks.store.uses import end_uses
from tests.store.shared_build import BUILDS, QUICK, WordSpec, build_word, spell

DAY = 86_400.0


class KilledError(Exception):
    pass


class World:
    """A bucket, and machines over it; ``pass_by`` makes everything in it older."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bucket = folder, folder / "bucket"

    def __getitem__(self, machine: str) -> SharedStore:
        return SharedStore(f"file://{self.bucket}", self.folder / machine, claim_seconds=0.2, patience=QUICK)

    def pass_by(self, days: float) -> None:
        for path in self.bucket.rglob("*"):
            if path.is_file():
                then = path.stat().st_mtime - days * DAY
                os.utime(path, (then, then))
        for path in self.bucket.glob(".runs/*.json"):
            run, then = orjson.loads(path.read_bytes()), path.stat().st_mtime
            path.write_bytes(orjson.dumps({**run, "began": run.get("began", then) - days * DAY}))
            os.utime(path, (then, then))

    def collect(self, machine: str = "collector", **options: object) -> Collected:
        return collect_bucket(self[machine], **{"keep_last": 1, "grace_seconds": DAY, **options})  # type: ignore[arg-type]

    def run(self, word: str, recipe: str = "mine", machine: str = "here") -> Artifact:
        """A recorded run of a recipe on a machine."""
        store = self[machine]
        with recorded_run(store.notes, recipe, ["letters"], None) as record:
            letters = spell(store, word)
            record("letters", letters.ref)
        return letters

    def objects(self, pattern: str) -> list[str]:
        return sorted(str(path.relative_to(self.bucket)) for path in self.bucket.glob(pattern) if path.is_file())

    def check(self) -> None:
        """Every manifest in its place has its files, and the shards it lists."""
        store = self["checker"]
        for artifact in store.load_all(store.refs()):
            assert artifact
            assert store.damage(artifact, digests=True) is None


@pytest.fixture
def world(tmp_path: Path) -> World:
    BUILDS.clear()
    return World(tmp_path)


def kinds(collected: Collected) -> dict[str, int]:
    found: dict[str, int] = {}
    for taken in collected.taken:
        kind = taken.what.partition("/")[0]
        found[kind] = found.get(kind, 0) + taken.number
    return found


def test_what_the_last_runs_of_all_machines_stand_on_is_kept_and_the_rest_goes_in_two_phases(world: World) -> None:
    old, new, other = world.run("abc"), world.run("bcd"), world.run("xyz", "yours", "there")
    world.pass_by(3)
    collected = world.collect()
    assert kinds(collected) == {"letters": 1, "word": 1, "letters-shard": 3}
    assert (collected.deleted_bytes, collected.trash_bytes) == (0, collected.taken_bytes)
    assert [world["third"].find("letters", one.key) is None for one in (old, new, other)] == [True, False, False]
    assert world.collect().deleted == ()
    world.pass_by(2)
    before = len(world.objects("*/**/*"))
    again = world.collect()
    assert {gone.what.partition("/")[0]: gone.number for gone in again.deleted} == {"letters": 1, "word": 1, "letters-shard": 3}
    assert again.deleted_bytes == 2 * len("abc")
    assert len(world.objects("*/**/*")) < before
    assert world.objects(".trash/**/*") == world.objects(f"word/{old.manifest.identity['inputs']['word']}*") == []
    world.check()
    assert world.run("abc").content == old.content


def test_to_try_it_changes_nothing_and_says_the_same(world: World) -> None:
    world.run("abc")
    world.run("bcd")
    world.pass_by(3)
    before = world.objects("[!.]*/**/*")
    tried = world.collect(dry_run=True)
    assert (world.objects("[!.]*/**/*"), world.objects(".trash/**/*")) == (before, [])
    assert world.collect().taken == tried.taken
    world.pass_by(2)
    before = world.objects("[!.]*/**/*")
    tried = world.collect(dry_run=True)
    assert world.objects("[!.]*/**/*") == before
    assert world.collect().deleted == tried.deleted != ()


def test_what_is_asked_for_again_comes_back_with_its_shards_and_is_not_built(world: World) -> None:
    old = world.run("abc")
    world.run("xyz")
    world.pass_by(3)
    assert world.collect().taken_bytes
    BUILDS.clear()
    again = world.run("abc", machine="there")
    assert (again.key, BUILDS) == (old.key, [])
    assert [again.shard_file(entry, "letter").read_text() for entry in again.shards()] == ["a", "b", "c"]
    world.pass_by(0.5)
    assert world.collect(keep_last=2).taken == ()
    world.check()


def test_a_pin_of_one_machine_keeps_what_it_names_from_the_collector_of_another(world: World) -> None:
    old = world.run("abc")
    world.run("xyz")
    pin(world["here"].notes, old, "released as 1.0")
    world.pass_by(3)
    assert world.collect().taken == ()
    assert unpin(world["there"].notes, old)
    assert kinds(world.collect()) == {"letters": 1, "word": 1, "letters-shard": 3}


def test_a_bucket_of_which_nothing_is_known_to_be_needed_is_left_alone(world: World) -> None:
    spell(world["here"], "abc")
    world.pass_by(30)
    with pytest.raises(StoreError, match=r"file://.*no pin and no recorded run says what is needed"):
        world.collect()
    assert len(world.objects("*/*/manifest.json")) == 5


def test_a_pin_that_cannot_be_read_stops_the_collector(world: World) -> None:
    pin(world["here"].notes, world.run("abc"))
    (name,) = world.objects(".pins/*")
    (world.bucket / name).write_text('{"ref": "wo')
    with pytest.raises(StoreError, match=r"\.pins/.*cannot be read .*what it names would be collected"):
        world.collect()


def test_two_hours_are_the_least_grace(world: World) -> None:
    world.run("abc")
    world.run("xyz")
    world.pass_by(1.5 / 24)
    assert world.collect(grace_seconds=0).taken == ()
    world.pass_by(1 / 24)
    assert kinds(world.collect(grace_seconds=0)) == {"letters": 1, "word": 1, "letters-shard": 3}
    world.pass_by(1.5 / 24)
    assert world.collect(grace_seconds=0).deleted == ()
    world.pass_by(1 / 24)
    assert world.collect(grace_seconds=0).deleted_bytes == 6


def test_what_a_living_process_uses_is_kept_and_a_dead_one_holds_nothing(world: World) -> None:
    old = world.run("abc")
    world.run("xyz")
    world.pass_by(3)
    lease = {"refs": [old.ref], "host": "there", "process": 1}
    world["there"].bucket.put(".leases/0", orjson.dumps(lease))
    collected = world.collect()
    assert collected.taken == ()
    assert collected.in_use_since
    world.pass_by(1)
    assert kinds(world.collect()) == {"letters": 1, "word": 1, "letters-shard": 3}
    assert world.objects(".leases/*") == [".leases/clock"]


def test_a_process_tells_what_it_uses_and_takes_it_back_when_it_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    end_uses()
    monkeypatch.setattr("tasks.store.uses.FIRST_SECONDS", 0.0)
    monkeypatch.setattr("tasks.store.uses.POLL_SECONDS", 0.01)
    letters = spell(world["here"], "abc")
    until(
        lambda: len(world.objects(".leases/*")) == 1 and letters.ref in (world.bucket / world.objects(".leases/*")[0]).read_text()
    )
    (name,) = world.objects(".leases/*")
    told = orjson.loads((world.bucket / name).read_bytes())
    assert letters.ref in told["refs"]
    assert not any("shard" in ref for ref in told["refs"])
    end_uses()
    assert world.objects(".leases/*") == []


def until(is_so: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_shards_that_wait_for_what_lists_them_are_kept_while_it_is_built(world: World) -> None:
    world.run("xyz")
    letters = spell(world["here"], "abc")
    (world.bucket / letters.ref / "manifest.json").unlink()  # as before its commit
    world.pass_by(3)
    world["there"].bucket.put(f".claims/letters-{letters.key}/0", b"{}")
    assert kinds(world.collect()) == {"word": 1}
    world.pass_by(1)
    assert kinds(world.collect()) == {"letters-shard": 3}


def test_a_run_that_stopped_on_its_way_keeps_what_it_had_come_to(world: World) -> None:
    def stop() -> None:
        with recorded_run(world["here"].notes, "other", ["model"], None) as record:
            record("letters", spell(world["here"], "abc").ref)
            raise KeyboardInterrupt

    world.run("xyz")
    with pytest.raises(KeyboardInterrupt):
        stop()
    world.pass_by(29)
    collected = world.collect(keep_last=1)
    assert (collected.taken, collected.unfinished_since is None) == ((), False)


def test_a_machine_whose_clock_is_years_off_collects_the_same(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run("abc")
    world.run("bcd")
    world.pass_by(0.5)
    for years in (-20, 20):
        monkeypatch.setattr("time.time", lambda years=years: 1.8e9 + years * 365 * DAY)
        monkeypatch.setattr("time.time_ns", lambda years=years: int(1.8e9 + years * 365 * DAY) * 10**9)
        assert world.collect().taken == ()
    monkeypatch.undo()
    world.pass_by(1)
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert kinds(world.collect()) == {"letters": 1, "word": 1, "letters-shard": 3}


def test_runs_are_in_the_order_of_the_bucket_s_clock(world: World) -> None:
    new = world.run("abc")
    world.run("xyz", machine="there")
    for path in world.bucket.glob(".runs/*"):  # the first was recorded by a machine whose clock is a year ahead
        value = orjson.loads(path.read_bytes())
        if new.ref in value["refs"].values():
            path.write_bytes(orjson.dumps({**value, "started": "2999-01-01T00:00:00.000000+00:00"}))
    world.pass_by(3)
    world.collect()
    assert world["third"].find("letters", new.key) is None


# Who has the last word


def test_what_is_wanted_back_while_its_deletion_begins_is_either_there_or_gone(world: World) -> None:
    old = world.run("abc")
    store = world["there"]
    data = store.bucket.get(f"{old.ref}/manifest.json")
    assert data
    for first in ("kept", "deleted"):
        condemn(store.bucket, old.kind, old.key, data)
        sentence = sentence_of(store.bucket, old.kind, old.key)
        assert sentence
        assert decide(store.bucket, sentence.number, first)  # type: ignore[arg-type]
        assert not decide(store.bucket, sentence.number, "kept" if first == "deleted" else "deleted")
        rescued = store.rescue(old.kind, old.key)
        assert (rescued is not None) == (first == "kept")


def test_a_deletion_that_was_killed_is_gone_on_with_and_nothing_comes_back_of_it(world: World) -> None:
    old = world.run("abc")
    world.run("xyz")
    world.pass_by(3)
    world.collect()
    world.pass_by(2)
    sentence = sentence_of(world["here"].bucket, old.kind, old.key)
    assert sentence
    assert decide(world["here"].bucket, sentence.number, "deleted")
    BUILDS.clear()
    assert world.run("abc", machine="there").content == old.content
    assert BUILDS[0] == "letters"
    world.collect(keep_last=2)
    world.check()
    assert world.objects(".trash/letters/*") == []


def test_a_collector_killed_before_it_took_a_manifest_away_has_changed_nothing(world: World) -> None:
    old = world.run("abc")
    world.run("xyz")
    store = world["here"]
    sentence = store.bucket.get(f"{old.ref}/manifest.json")
    assert sentence
    condemn(store.bucket, old.kind, old.key, sentence)
    store.bucket.put(f"{old.ref}/manifest.json", sentence)
    world.pass_by(3)
    collected = world.collect(keep_last=2)
    assert (collected.taken, collected.deleted, world.objects(".trash/**/*")) == ((), (), [])
    world.check()


def test_who_wanted_it_back_and_did_not_come_to_it_holds_it_for_one_more_grace(world: World) -> None:
    old = world.run("abc")
    world.run("xyz")
    world.pass_by(3)
    world.collect()
    sentence = sentence_of(world["here"].bucket, old.kind, old.key)
    assert sentence
    decide(world["here"].bucket, sentence.number, "kept")
    world.pass_by(2)
    world.collect()
    assert f".trash/{old.kind}/{old.key}.json" in world.objects(".trash/**/*")
    world.pass_by(2)
    world.collect()
    assert world.objects(".trash/**/*") == []


def test_leftovers_of_builds_go_after_a_day_and_a_commit_that_comes_later_moves(world: World) -> None:
    world.run("xyz")
    killed = world["here"]
    staging = killed.staging("word", build_word(world["there"], Machine(), WordSpec(word="a")).key)
    (staging / "word.txt").write_text("a")
    identity = build_word.identity(WordSpec(word="a"), {})

    def kill(*_: object) -> None:
        raise KilledError

    killed._put_manifest = kill  # type: ignore[method-assign, assignment]
    with pytest.raises(KilledError):
        killed.commit(identity, (), {}, {}, {})
    (word,) = [one for one in world["there"].artifacts("word") if one.manifest.identity == identity]
    (world.bucket / word.ref / "manifest.json").unlink()
    assert len(world.objects(f"{word.ref}/*/*")) == 2
    world.pass_by(0.9)
    assert world.collect(grace_seconds=0).deleted == ()
    world.pass_by(0.2)
    assert [(gone.what, gone.number) for gone in world.collect(grace_seconds=0).deleted] == [("leftovers of word", 2)]
    assert world.objects(f"{word.ref}/*/*") == []
    BUILDS.clear()
    again = build_word(world["here"], Machine(), WordSpec(word="a"))  # goes on with the upload
    assert (BUILDS, again.file("word.txt").read_text()) == ([], "a")
    assert world["third"].damage(again, digests=True) is None


def test_an_upload_that_was_taken_up_in_time_is_not_left_over(world: World) -> None:
    world.run("xyz")
    killed = world["here"]
    identity = build_word.identity(WordSpec(word="a"), {})
    build_word(killed, Machine(), WordSpec(word="a"))
    (name,) = [
        name
        for name in world.objects("word/*/manifest.json")
        if orjson.loads((world.bucket / name).read_bytes())["identity"] == identity
    ]
    (place,) = [path.name for path in (world.bucket / name).parent.iterdir() if path.is_dir()]
    assert decide(world["there"].bucket, place, "kept")
    data = (world.bucket / name).read_bytes()
    (world.bucket / name).unlink()
    world.pass_by(1.5)
    (world.bucket / ".fates" / place).touch()
    assert world.collect(grace_seconds=0).deleted == ()
    (world.bucket / name).write_bytes(data)
    world.check()


def test_what_is_long_over_is_swept(world: World) -> None:
    letters = world.run("abc")
    bucket = world["here"].bucket
    ends = (
        "damaged/word-1.json",
        "claims/word-2/0",
        "claims/word-2/1",
        f"fates/{'1' * 16}",
        f"checkpoints/word/{'1' * 64}/kept.json",
    )
    for name in ends:
        bucket.put(f".{name}", b"{}")
    world.pass_by(0.5)
    world.collect(grace_seconds=0)
    assert len(world.objects(".[dcf]*/**/*")) == 5
    world.pass_by(1)
    assert {gone.what for gone in world.collect(grace_seconds=0).deleted} == {"damaged", "checkpoints of word"}
    assert world.objects(".[dcf]*/**/*") == []
    assert world["there"].find("letters", letters.key)


def test_a_copy_that_heard_of_it_before_it_was_built_anew_is_read_where_it_is_now(world: World) -> None:
    old = world.run("ab", machine="stale")
    world["stale"].artifacts()
    for path in world["stale"].root.glob("letters-shard/*/letter"):
        path.unlink()
    world.run("xyz")
    world.pass_by(3)
    world.collect()
    world.pass_by(2)
    assert world.collect().deleted_bytes
    assert world.run("ab", machine="there").content == old.content
    found = spell(world["stale"], "ab")
    assert [found.shard_file(entry, "letter").read_text() for entry in found.shards()] == ["a", "b"]
    assert found.read("word.txt", 0, 1) == b"a" if found.has_file("word.txt") else True


def test_a_copy_that_heard_of_what_was_collected_since_builds_it_again(world: World) -> None:
    old = world.run("ab", machine="stale")
    for path in world["stale"].root.glob("letters-shard/*/letter"):
        path.unlink()
    world.run("xyz")
    world.pass_by(3)
    world.collect()
    world.pass_by(2)
    assert world.collect().deleted_bytes
    BUILDS.clear()
    assert world.run("ab", machine="stale").content == old.content
    assert BUILDS == ["letters", "a", "b"]  # the word was whole in the cache
    world.check()


# Whatever happens


@contextmanager
def dying_after(world: World, requests: int):  # type: ignore[no-untyped-def]
    """A collector whose machine loses its power after so many requests."""
    from tasks.store.bucket import Bucket

    class Died(BaseException):
        pass

    left = [requests]
    real = Bucket._patiently

    def count(self: Bucket, name: str, call: Callable[[], object]) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise Died
        return real(self, name, call)

    Bucket._patiently = count  # type: ignore[method-assign, assignment]
    try:
        yield Died
    finally:
        Bucket._patiently = real  # type: ignore[method-assign]


WORDS = ("abc", "bcd", "cde", "ab", "xyz")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("run"), st.sampled_from(WORDS), st.sampled_from(["mine", "yours"])),
        st.tuples(st.just("spell"), st.sampled_from(WORDS), st.sampled_from(["here", "there"])),
        st.tuples(st.just("pin"), st.sampled_from(WORDS), st.booleans()),
        st.tuples(st.just("days"), st.sampled_from([0.05, 0.5, 1.5, 3.0]), st.none()),
        st.tuples(st.just("collect"), st.sampled_from([0.0, 1.0]), st.one_of(st.none(), st.integers(0, 120))),
    ),
    max_size=14,
)


@given(steps=STEPS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_nothing_that_is_reachable_is_ever_deleted(tmp_path: Path, steps: list[tuple[str, object, object]]) -> None:
    play(World(tmp_path / secrets.token_hex(8)), steps)


def play(world: World, steps: list[tuple[str, object, object]]) -> None:
    """Runs, pins, days and collections, some of which die: what a last run or a pin names is there, and nothing is in ruins."""
    pinned: dict[str, Artifact] = {}
    last = {"mine": world.run("keep")}
    for what, first, second in steps:
        if what == "run":
            last[str(second)] = world.run(str(first), str(second))
        elif what == "spell":
            spell(world[str(second)], str(first))
        elif what == "pin" and second:
            pinned[str(first)] = spell(world["there"], str(first))
            pin(world["there"].notes, pinned[str(first)])
        elif what == "pin" and (artifact := pinned.pop(str(first), None)):
            unpin(world["here"].notes, artifact)
        elif what == "days":
            world.pass_by(float(str(first)))
        elif what == "collect":
            with dying_after(world, 10**9 if second is None else int(str(second))) as died:
                try:
                    world.collect(grace_seconds=float(str(first)) * DAY)
                except died:
                    world.pass_by(0.1)
        world.check()
        for artifact in (*last.values(), *pinned.values()):
            found = world["reader"].find(artifact.kind, artifact.key) or world["reader"].rescue(artifact.kind, artifact.key)
            assert found
            assert world["reader"].damage(found, digests=True) is None
