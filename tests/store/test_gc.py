"""What the collector takes and what it leaves, on two small stages; and beside builds in other processes."""

import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.errors import StoreError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore
from tasks.store.gc import Collected, collect
from tasks.store.lease import end_lease
from tasks.store.notes import FolderNotes
from tasks.store.pins import last_refs, pin, pins, recorded_run, runs, unpin
from tests.store.test_stage import ListSpec, WordSpec, build_letters, build_word

DAY = 86_400.0


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def built(store: ArtifactStore, word: str, recipe: str | None = None) -> Artifact:
    """A word and the shards of its letters, recorded as a run where a recipe is named."""
    machine = Machine()
    made = build_letters(store, machine, ListSpec(), word=build_word(store, machine, WordSpec(word=word)))
    if recipe:
        with recorded_run(store.notes, recipe, ["letters"], None) as record:
            record("letters", made.ref)
    return made


def aged(store: ArtifactStore, days: float = 30) -> None:
    """As if nothing had been touched for so long, and nobody used the store."""
    end_lease(store.root)
    paths = [path for folder in store.root.glob("[!.]*/*") for path in (folder, *folder.iterdir())]
    for path in [*paths, *store.root.glob(".locks/*"), *store.root.glob(".staging/**/*"), *store.root.glob(".damaged/**/*")]:
        then = path.stat().st_mtime - days * DAY
        os.utime(path, (then, then))


def gone(store: ArtifactStore, keep_last: int = 1, days: float = 1, dry_run: bool = False) -> Collected:
    return collect(store, keep_last=keep_last, grace_seconds=days * DAY, dry_run=dry_run)


def held(store: ArtifactStore) -> list[str]:
    return sorted(f"{kind}/{key}" for kind in store.kinds() for key in store.keys(kind))


def test_what_the_last_run_stands_on_is_kept_and_the_rest_goes_in_two_phases(store: ArtifactStore) -> None:
    old, new = built(store, "abc", "mine"), built(store, "bcd", "mine")
    aged(store)
    collected = gone(store)
    assert {taken.what.partition("/")[0]: taken.number for taken in collected.taken} == {
        "letters": 1,
        "word": 1,
        "letter-shard": 1,  # b and c are the new one's too
    }
    assert collected.taken_bytes > 4
    assert (collected.deleted_bytes, collected.trash_bytes) == (0, collected.taken_bytes)
    assert store.find("letters", new.key)
    assert store.load("letters", old.key) is None
    again = gone(store, days=0)
    assert (again.deleted_bytes, again.trash_bytes, again.taken) == (collected.taken_bytes, 0, ())
    assert not list((store.root / ".trash").iterdir())


def test_to_try_it_changes_nothing_and_says_the_same(store: ArtifactStore) -> None:
    built(store, "abc", "mine")
    built(store, "bcd", "mine")
    aged(store)
    before = held(store)
    tried = gone(store, dry_run=True)
    assert held(store) == before
    assert not (store.root / ".trash").exists()
    assert tried.taken == gone(store).taken


def test_what_is_asked_for_again_is_taken_back_out_of_the_trash(store: ArtifactStore) -> None:
    old = built(store, "abc", "mine")
    built(store, "xyz", "mine")
    before = old.path / "manifest.json"
    inode = before.stat().st_ino
    aged(store)
    gone(store)
    assert not before.exists()
    again = built(store, "abc")
    assert (again.found, again.key) == (True, old.key)
    assert before.stat().st_ino == inode
    assert all(store.find(entry.kind, entry.key) for entry in again.shards())


def test_staging_comes_back_out_of_the_trash_as_a_killed_build_left_it(store: ArtifactStore) -> None:
    built(store, "abc", "mine")
    staging = store.staging("word", store.keys("letters")[0])
    (staging / "checkpoint").write_text("far")
    aged(store)
    assert [taken.what for taken in gone(store).taken] == ["staging of word"]
    assert not staging.exists()
    assert (store.staging("word", store.keys("letters")[0]) / "checkpoint").read_text() == "far"


def test_staging_that_is_being_built_in_stays_however_old(store: ArtifactStore) -> None:
    built(store, "abc", "mine")
    key = store.keys("letters")[0]
    with store.lock("word", key):
        staging = store.staging("word", key)
        aged(store)
        assert gone(store, days=0).taken == ()
        assert staging.exists()


def test_a_pin_keeps_what_no_run_names_and_all_that_it_was_made_from(store: ArtifactStore) -> None:
    old = built(store, "abc")
    built(store, "xyz", "mine")
    pin(store.notes, old, "released as 1.0")
    assert [(pinned["ref"], pinned["note"]) for pinned in pins(store.notes)] == [(old.ref, "released as 1.0")]
    aged(store)
    assert gone(store).taken == ()
    assert unpin(store.notes, old)
    assert not unpin(store.notes, old)
    assert {taken.what.partition("/")[0] for taken in gone(store).taken} == {"letters", "word", "letter-shard"}


def test_a_store_of_which_nothing_is_known_to_be_needed_is_left_alone(store: ArtifactStore) -> None:
    built(store, "abc")
    aged(store)
    with pytest.raises(StoreError, match="no pin and no recorded run says what is needed"):
        gone(store)
    assert len(held(store)) == 5


def test_what_was_found_within_the_grace_is_kept(store: ArtifactStore) -> None:
    built(store, "abc")
    built(store, "xyz", "mine")
    aged(store)
    built(store, "abc")
    end_lease(store.root)
    collected = gone(store)
    assert collected.taken == ()
    assert collected.num_in_use >= 1


def test_what_a_living_process_found_is_kept_without_any_grace(store: ArtifactStore) -> None:
    built(store, "xyz", "mine")
    aged(store)
    built(store, "abc")  # and this process lives
    collected = gone(store, days=0)
    assert collected.taken == ()
    assert collected.in_use_since is not None
    end_lease(store.root)
    assert {taken.what.partition("/")[0] for taken in gone(store, days=0).taken} == {"letters", "word", "letter-shard"}


def test_old_locks_and_what_was_set_aside_go_too(store: ArtifactStore) -> None:
    word = build_word(store, Machine(), WordSpec(word="old"))
    (word.path / "word.txt").unlink()
    build_word(store, Machine(), WordSpec(word="old"))
    built(store, "abc", "mine")
    aged(store)
    what = [taken.what for taken in gone(store).taken]
    assert "damaged" in what
    assert not list(store.root.glob(".locks/*"))


def test_of_every_node_the_last_different_artifacts_are_kept(tmp_path: Path) -> None:
    def run(recipe: str, **refs: str) -> None:
        with recorded_run(FolderNotes(tmp_path), recipe, ["end"], None) as record:
            for name, ref in refs.items():
                record(name, ref)

    run("mine", tokens="tokens/1", model="pretrained/1")
    run("mine", tokens="tokens/2", model="pretrained/2")
    run("mine", tokens="tokens/3")  # until tokens only
    run("mine", tokens="tokens/3")
    run("yours", tokens="tokens/9")
    recorded = runs(FolderNotes(tmp_path))
    assert last_refs(recorded, 1) == {"tokens/3", "pretrained/2", "tokens/9"}
    assert last_refs(recorded, 2) == {"tokens/3", "tokens/2", "pretrained/2", "pretrained/1", "tokens/9"}
    assert last_refs(recorded, 0) == set()


def test_a_run_is_recorded_as_it_goes_and_says_how_it_ended(tmp_path: Path) -> None:
    def fail() -> None:
        with recorded_run(FolderNotes(tmp_path), "mine", ["blocks"], {"a.b": 1}) as record:
            record("archive", "archive/1")
            assert runs(FolderNotes(tmp_path))[0]["state"] == "running"
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    (run,) = runs(FolderNotes(tmp_path))
    assert (run["recipe"], run["state"], run["refs"]) == ("mine", "failed", {"archive": "archive/1"})
    assert (run["overrides"], run["error"]) == ({"a.b": 1}, "ValueError: no")


def test_a_record_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    with recorded_run(FolderNotes(tmp_path), "mine", ["blocks"], None) as record:
        record("archive", "archive/1")
    (tmp_path / ".runs" / "torn.json").write_text('{"recipe": "mi')
    assert [run["recipe"] for run in runs(FolderNotes(tmp_path))] == ["mine"]


WORDS = ("abcdef", "defghi", "ghijkl", "jklabc")


def _build_again(root: Path, seed: int) -> list[str]:
    """Build words in turn, and read every shard of each; returns what was not there."""
    store, missing = ArtifactStore(root), []
    for turn in range(12):
        word = WORDS[(turn * (seed + 1) + seed) % len(WORDS)]
        artifact = build_letters(
            store, replace(Machine(), recipe="r"), ListSpec(), word=build_word(store, Machine(), WordSpec(word=word))
        )
        try:
            text = "".join(artifact.shard_file(entry, "letter").read_text() for entry in artifact.shards())
        except OSError as error:
            text = str(error)
        missing += [text] if text != word else []
    return missing


def test_builds_in_other_processes_lose_nothing_to_a_collector_without_grace(store: ArtifactStore) -> None:
    built(store, "keep", "mine")
    end_lease(store.root)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        builds = pool.starmap_async(_build_again, [(store.root, seed) for seed in range(3)])
        collections = 0
        while not builds.ready():
            collect(store, keep_last=1, grace_seconds=0)
            collections += 1
        assert builds.get() == [[], [], []]
    assert collections > 0
    pool.join()
    assert collect(store, keep_last=1, grace_seconds=0).taken_bytes > 0  # and when they have ended, what they left goes
    assert len(store.keys("letters")) == 1


def test_a_lease_dies_with_its_process(store: ArtifactStore) -> None:
    built(store, "abc", "mine")
    aged(store)
    code = (
        "import sys; from pathlib import Path; from tests.store.test_gc import built; "
        "from tasks.store import ArtifactStore; built(ArtifactStore(Path(sys.argv[1])), 'xyz'); "
        "print('built', flush=True); input()"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code, store.root], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "built\n"
    assert gone(store, days=0).taken == ()
    process.kill()
    process.communicate()
    assert gone(store, days=0).taken_bytes > 0
