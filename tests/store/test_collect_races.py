"""What happens beside a collection, or in the midst of one: builders begin, trainings stop, machines sleep."""

import errno
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from tasks.errors import StoreError
from tasks.machine import Machine
from tasks.store import SharedStore, digest_json
from tasks.store.bucket import Bucket, Listed
from tasks.store.collect import _Sweep, collect_bucket
from tasks.store.fate import condemn, decide, sentence_of
from tasks.store.pins import pin, recorded_run
from tasks.store.survey import Survey
from tests.store.shared_build import BUILDS, QUICK, WordSpec, build_word, spell
from tests.store.test_collect import DAY, World, kinds

LEAST = 7200.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    BUILDS.clear()
    return World(tmp_path)


def after_survey(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], Any]) -> None:
    """Something happens on another machine once a collection has looked at the bucket."""
    real = Survey.__init__

    def survey(self: Survey, *args: Any) -> None:
        real(self, *args)
        happens()

    monkeypatch.setattr(Survey, "__init__", survey)


def test_the_claim_of_a_builder_that_begins_meanwhile_is_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run("abc")
    name = f".claims/word-{'0' * 64}/0"
    after_survey(monkeypatch, lambda: world["there"].bucket.put(name, b"{}"))
    world.collect()
    assert world.objects(".claims/**/*") == [name]


def stopped_training(world: World, key: str = "1" * 64) -> list[str]:
    """Checkpoints of a training that was stopped."""
    names = [f".checkpoints/word/{key}/{name}" for name in ("kept.json", "sign")]
    for name in names:
        world["there"].bucket.put(name, b"[]")
    return names


def test_checkpoints_of_a_training_that_was_gone_on_with_meanwhile_are_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run("abc")
    names = stopped_training(world)
    world.pass_by(3)
    after_survey(monkeypatch, lambda: world["there"].bucket.put(names[0], b"[1]"))
    assert world.collect().deleted == ()
    assert world.objects(".checkpoints/**/*") == names


def test_a_training_that_somebody_goes_on_with_does_not_hold_the_collector_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run("abc")
    names = stopped_training(world)
    world.pass_by(3)
    holder = {"nonce": "1", "cache": "another", "host": "there", "process": 1, "seconds": 0.5}
    claim = orjson.dumps(holder)
    after_survey(monkeypatch, lambda: world["there"].bucket.put(f".claims/word-{'1' * 64}/0", claim))
    assert world.collect().deleted == ()
    assert world.objects(".checkpoints/**/*") == names


def test_a_run_with_other_overrides_does_not_end_a_training_that_was_stopped(world: World) -> None:
    def stop() -> None:
        with recorded_run(world["here"].notes, "mine", ["model"], {"pretrained.seed": 1}):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    names = stopped_training(world)
    with recorded_run(world["here"].notes, "mine", ["model"], {"pretrained.seed": 2}) as record:
        record("letters", spell(world["here"], "abc").ref)
    world.pass_by(3)
    assert world.collect().deleted == ()
    assert world.objects(".checkpoints/**/*") == names
    world.pass_by(30)
    assert [gone.what for gone in world.collect().deleted] == ["checkpoints of word", "records of runs"]


def test_a_collector_whose_disk_is_full_takes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = world.run("abc")
    pin(world["here"].notes, pinned)
    world.run("xyz")
    world.pass_by(3)
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name.endswith(".partial") and "collector" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="No space left on device"):
        world.collect()
    assert world["third"].find(pinned.kind, pinned.key)
    assert world.objects(".trash/**/*") == []


def test_an_upload_that_is_gone_on_with_does_not_go_where_files_are_being_deleted(world: World) -> None:
    world.run("xyz")
    spec, here = WordSpec(word="a", num_bytes=64), world["here"]
    word = build_word(here, Machine(), spec)
    # The answer to the commit was lost: what was sent lies in staging still.
    shutil.copytree(here.root / word.ref, here.root / ".staging" / word.ref)
    shutil.rmtree(here.root / word.ref)
    data = here.bucket.get(f"{word.ref}/manifest.json")
    assert data
    condemn(here.bucket, word.kind, word.key, data)
    sentence = sentence_of(here.bucket, word.kind, word.key)
    assert sentence
    assert decide(here.bucket, sentence.number, "deleted")
    doomed = world.objects(f"{word.ref}/*/**/*")
    BUILDS.clear()
    again = build_word(world["here"], Machine(), spec)
    for name in doomed:  # only now do the collector's requests arrive
        here.bucket.delete(name)
    assert BUILDS == []
    assert world["third"].damage(again, digests=True) is None


def test_a_shard_in_the_trash_stays_while_what_may_list_it_is_built(world: World) -> None:
    letters = spell(world["here"], "abc")
    world.run("xyz")
    world.pass_by(3)
    assert kinds(world.collect()) == {"letters": 1, "word": 1, "letters-shard": 3}
    world.pass_by(2)
    world["there"].bucket.put(f".claims/letters-{'1' * 64}/0", b"{}")  # has found the shards before they were condemned
    world.collect()
    shards = [entry.key for entry in letters.shards()]
    assert [world["there"].rescue("letters-shard", key) is None for key in shards] == [False] * 3
    world.check()


def test_a_collector_that_slept_deletes_nothing_that_was_condemned_anew_meanwhile(world: World) -> None:
    old = world.run("abc")
    world.run("xyz")
    world.pass_by(3)
    world.collect()
    world.pass_by(2)
    survey = Survey(world["collector"], 1, DAY, LEAST)
    # While it sleeps all is taken back, and long after that another collector condemns it again.
    for kind, key in [(old.kind, old.key), *((entry.kind, entry.key) for entry in old.shards())]:
        there = world["there"]
        assert there.rescue(kind, key) or there.find(kind, key)
        data = there.bucket.get(f"{kind}/{key}/manifest.json")
        assert data
        condemn(there.bucket, kind, key, data)
    shutil.rmtree(world.bucket / ".fates")  # of decisions that are long over
    sweep = _Sweep(survey, dry_run=False, left_seconds=DAY)
    sweep.artifacts()
    sweep.shards()
    found = world["third"].rescue(old.kind, old.key)
    assert found
    assert world["third"].damage(found, digests=True) is None


def test_a_machine_that_slept_for_days_in_its_upload_commits_what_is_there(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run("xyz")
    slow, identity = world["here"], build_word.identity(WordSpec(word="a", num_bytes=64), {})
    staging = slow.staging("word", digest_json(identity))
    for name in ("first", "second"):
        (staging / name).write_text(name)
    sent, slept, real = threading.Event(), [0.0], Bucket.upload

    def upload(self: Bucket, source: Path, name: str, advance: Callable[[int], None]) -> None:
        if source.name == "second" and not slept[0]:
            assert sent.wait(10)
            slept[0] = 4 * DAY
            for days in (1.5, 2.5):  # the first is left over, and then so is the word on it
                world.pass_by(days)
                collected = world.collect(grace_seconds=0)
                assert [gone.what for gone in collected.deleted if "leftovers" in gone.what] == ["leftovers of word"][: days < 2]
        real(self, source, name, advance)
        sent.set()

    monkeypatch.setattr(Bucket, "upload", upload)
    monkeypatch.setattr("tasks.store.publish.boot_seconds", lambda: slept[0])
    word = slow.commit(identity, (), {}, {}, {})
    assert slept[0]
    assert world["third"].damage(word, digests=True) is None
    world.check()


def test_an_upload_that_is_gone_on_with_trusts_no_file_of_what_was_set_aside(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.store.publish.SHOWN_BYTES", 1)
    spec, here = WordSpec(word="a", num_bytes=64), world["here"]
    word = build_word(here, Machine(), spec)
    # The answer to the commit was lost: what was sent lies in staging still.
    (here.root / ".staging/word").mkdir(parents=True, exist_ok=True)
    (here.root / word.ref).rename(here.root / ".staging" / word.ref)
    (sent,) = world.objects(f"{word.ref}/*/large/bytes")
    (world.bucket / sent).write_bytes(b"b" * 64)
    with pytest.raises(StoreError, match="it was set aside"):
        world["there"].resolve(word.ref).file("large/bytes")
    BUILDS.clear()
    again = build_word(world["here"], Machine(), spec)
    assert BUILDS == []
    assert world["third"].damage(again, digests=True) is None


def test_a_listing_that_shows_what_is_condemned_takes_no_sentence_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = world.run("abc")
    world.run("xyz")
    world.pass_by(3)
    real, before = Bucket.objects, list(world["there"].bucket.objects())
    world.collect()
    pin(world["there"].notes, old)  # as if it had been named just before
    gone = [one for one in before if one.name.endswith("manifest.json") and not (world.bucket / one.name).exists()]

    def lagging(self: Bucket, folder: str = "") -> Iterator[Listed]:
        listed = {one.name: one for one in [*real(self, folder), *(one for one in gone if one.name.startswith(f"{folder}/"))]}
        yield from (listed[name] for name in sorted(listed))

    monkeypatch.setattr(Bucket, "objects", lagging)
    world.collect()
    monkeypatch.undo()
    BUILDS.clear()
    again = world.run("abc", machine="another")
    assert (again.key, BUILDS) == (old.key, [])
    assert world["third"].damage(again, digests=True) is None


@pytest.mark.timeout(30)
def test_a_collector_whose_cache_is_bounded_does_not_wait_for_itself(world: World) -> None:
    """What it gives back needs a shard whose upload was killed on its own machine: room is made for it in the cache."""
    old = world.run("abc", machine="collector")
    world.run("xyz")
    world.pass_by(3)
    world.collect()
    pin(world["there"].notes, old)
    entry = next(iter(old.shards()))
    place = f"{entry.kind}/{entry.key}"
    shutil.rmtree(world.bucket / place)
    (world.bucket / f".trash/{place}.json").unlink()
    cache = world["collector"].root
    (cache / ".staging" / entry.kind).mkdir(parents=True, exist_ok=True)
    (cache / place).rename(cache / ".staging" / place)
    bounded = SharedStore(f"file://{world.bucket}", world.folder / "collector", claim_seconds=0.2, patience=QUICK, cache_bytes=1)
    collect_bucket(bounded, keep_last=1, grace_seconds=DAY)
    found = world["third"].find(old.kind, old.key)
    assert found
    assert world["third"].damage(found, digests=True) is None
