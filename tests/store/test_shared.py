"""The promises of a shared store, tried on a folder that speaks like a bucket: two caches are two machines."""

import contextlib
import pickle
import shutil
from pathlib import Path

import pytest

from tasks.corpus.shards import load_shards
from tasks.errors import RefError, SettingsError, StoreError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, SharedStore, cache_folder, is_url, publish
from tasks.store.bucket import Bucket
from tasks.store.claim import Holder, claimed
from tasks.store.store import size_problem
from tests.store.shared_build import BUILDS, QUICK, NoSpec, WordSpec, build_drawn, build_letters, build_word, spell


class Machines:
    """Machines over one bucket; each has a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bucket = folder, folder / "bucket"

    def __getitem__(self, name: str) -> SharedStore:
        return SharedStore(f"file://{self.bucket}", self.folder / name, claim_seconds=0.2, patience=QUICK)

    def objects(self, pattern: str) -> list[Path]:
        return sorted(path for path in self.bucket.glob(pattern) if path.is_file())


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    BUILDS.clear()
    return Machines(tmp_path)


def fetched(artifact: Artifact) -> list[str]:
    """The files of an artifact that are in the cache."""
    return [entry.name for entry in artifact.manifest.files if size_problem(artifact.folder / entry.name, entry) is None]


def test_another_machine_finds_everything_and_builds_nothing(machines: Machines) -> None:
    first = spell(machines["here"], "abc")
    num_builds = len(BUILDS)
    second = spell(machines["there"], "abc")
    assert (first.found, second.found, second.content, len(BUILDS)) == (False, True, first.content, num_builds)
    assert [second.shard_file(entry, "letter").read_text() for entry in second.shards()] == ["a", "b", "c"]


def test_keys_and_contents_are_those_of_a_local_store(machines: Machines, tmp_path: Path) -> None:
    local = spell(ArtifactStore(tmp_path / "local"), "abc")
    shared = spell(machines["here"], "abc")
    assert (shared.key, shared.content, shared.manifest.shards) == (local.key, local.content, local.manifest.shards)


def test_a_file_is_fetched_when_its_path_is_asked_for_and_once(machines: Machines) -> None:
    build_word(machines["here"], Machine(), WordSpec(word="abc", num_bytes=9))
    found = build_word(machines["there"], Machine(), WordSpec(word="abc", num_bytes=9))
    assert fetched(found) == []
    path = found.file("word.txt")
    assert (path.read_text(), fetched(found)) == ("abc", ["word.txt"])
    inode = path.stat().st_ino
    assert sorted(one.name for one in found.path.rglob("*") if one.is_file()) == ["bytes", "manifest.json", "word.txt"]
    assert found.file("word.txt").stat().st_ino == inode


@pytest.mark.slow
def test_workers_in_other_processes_build_shards_in_the_same_store(machines: Machines) -> None:
    store = machines["here"]
    machine = Machine(num_workers=2, pool="processes")
    word = build_word(store, machine, WordSpec(word="ab"))
    build_letters(store, machine, NoSpec(), word=word)
    assert len(machines.objects("letters-shard/*/manifest.json")) == 2


def test_an_artifact_that_went_to_another_process_fetches_there(machines: Machines) -> None:
    build_word(machines["here"], Machine(), WordSpec(word="abc"))
    sent = pickle.loads(pickle.dumps(build_word(machines["there"], Machine(), WordSpec(word="abc"))))
    assert sent.file("word.txt").read_text() == "abc"


@pytest.mark.parametrize("damage", ["other bytes", "shorter", "missing"])
def test_damage_in_the_bucket_is_never_served_and_the_next_run_rebuilds(machines: Machines, damage: str) -> None:
    build_word(machines["here"], Machine(), WordSpec(word="abc"))
    shutil.rmtree(machines["here"].root)
    (path,) = machines.objects("word/*/*/word.txt")
    path.unlink() if damage == "missing" else path.write_text("abd" if damage == "other bytes" else "a")
    found = build_word(machines["there"], Machine(), WordSpec(word="abc"))
    with pytest.raises(StoreError, match=r"word\.txt .*set aside: run again"):
        found.file("word.txt")
    again = build_word(machines["there"], Machine(), WordSpec(word="abc"))
    assert (again.found, again.file("word.txt").read_text()) == (False, "abc")
    assert len(machines.objects(".damaged/*")) == 1


def test_a_lost_shard_alone_is_rebuilt(machines: Machines) -> None:
    whole = spell(machines["here"], "abc")
    entry = list(whole.shards())[1]
    shutil.rmtree(machines["here"].root)
    (machines.bucket / entry.kind / entry.key / "manifest.json").unlink()
    found = spell(machines["there"], "abc")
    with pytest.raises(StoreError, match=r"shard train/00001 .* is missing; it was set aside"):
        found.shard_file(entry, "letter")
    BUILDS.clear()
    again = spell(machines["there"], "abc")
    assert (again.found, again.content, BUILDS) == (False, whole.content, ["letters", "b"])


def test_a_damaged_shard_takes_what_lists_it_out_of_its_place(machines: Machines) -> None:
    whole = spell(machines["here"], "ab")
    entry = next(whole.shards())
    shutil.rmtree(machines["here"].root)
    (path,) = machines.objects(f"{entry.kind}/{entry.key}/*/letter")
    path.write_text("x")
    with pytest.raises(StoreError, match="set aside"):
        spell(machines["there"], "ab").shard_file(entry, "letter")
    BUILDS.clear()
    assert (spell(machines["there"], "ab").content, BUILDS) == (whole.content, ["letters", "a"])


def test_a_shard_that_a_stage_misses_takes_what_lists_it_out_of_its_place(machines: Machines) -> None:
    whole = spell(machines["here"], "ab")
    shutil.rmtree(machines["here"].root)
    entry = next(whole.shards())
    (machines.bucket / entry.kind / entry.key / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"shard train/00000 .* is missing; run again"):
        load_shards(machines["there"], list(spell(machines["there"], "ab").shards()))
    BUILDS.clear()
    assert (spell(machines["there"], "ab").content, BUILDS) == (whole.content, ["letters", "a"])


def test_a_manifest_that_cannot_be_read_is_set_aside_when_its_key_is_built(machines: Machines) -> None:
    word = build_word(machines["here"], Machine(), WordSpec(word="abc"))
    (path,) = machines.objects("word/*/manifest.json")
    path.write_text("{")
    again = build_word(machines["there"], Machine(), WordSpec(word="abc"))
    assert (again.found, again.content) == (False, word.content)
    assert len(machines.objects(".damaged/*")) == 1


def test_a_bucket_that_was_cleared_is_filled_from_the_cache(machines: Machines) -> None:
    whole = spell(machines["here"], "abc")
    shutil.rmtree(machines.bucket)
    BUILDS.clear()
    assert (spell(machines["here"], "abc").content, BUILDS) == (whole.content, [])
    assert spell(machines["there"], "abc").found
    assert len(machines.objects("letters-shard/*/manifest.json")) == 3


def test_a_shard_that_neither_bucket_nor_cache_has_is_built_again(machines: Machines) -> None:
    store = machines["here"]
    whole = spell(store, "ab")
    lost = next(whole.shards())
    shutil.rmtree(machines.bucket)
    (store.root / lost.kind / lost.key / "letter").unlink()
    BUILDS.clear()
    assert (spell(store, "ab").content, BUILDS) == (whole.content, ["letters", "a"])


class KilledError(Exception):
    pass


class KillingBucket(Bucket):
    """Ends the build where its manifest is to be put."""

    def put_new(self, name: str, data: bytes) -> bool:
        if name.startswith("drawn/"):
            raise KilledError
        return super().put_new(name, data)


class CarelessBucket(Bucket):
    """As a server that does not know If-None-Match."""

    def put_new(self, name: str, data: bytes) -> bool:
        self.put(name, data)
        return True


def test_a_commit_that_was_killed_in_its_upload_goes_on_without_a_build(machines: Machines) -> None:
    killed = machines["here"]
    killed.bucket = KillingBucket(killed.bucket.url)
    with pytest.raises(KilledError):
        build_drawn(killed, Machine(), WordSpec(word="a"))
    assert machines.objects("drawn/*/manifest.json") == []
    again = build_drawn(machines["here"], Machine(), WordSpec(word="a"))
    assert (again.file("a").read_bytes(), BUILDS) == (again.file("b").read_bytes(), ["drawn"])


def test_of_two_builders_that_both_finish_the_first_is_kept_whole(machines: Machines) -> None:
    """The claim was lost meanwhile: the second finds a manifest where its own was to go."""
    here, there = machines["here"], machines["there"]
    identity = build_drawn.identity(WordSpec(word="a"), {})
    for store in (here, there):
        staging = store.staging("drawn", build_drawn(machines["third"], Machine(), WordSpec(word="a")).key)
        shutil.rmtree(machines.bucket)
        (staging / "a").write_text(store.root.parent.name)
        (staging / "b").write_text(store.root.parent.name)
    first = here.commit(identity, (), {}, {}, {})
    second = there.commit(identity, (), {}, {}, {})
    assert (second.found, second.content) == (True, first.content)
    assert [second.file(name).read_text() for name in ("a", "b")] == ["here", "here"]


def test_a_server_that_ignores_conditions_is_refused(machines: Machines) -> None:
    store = machines["here"]
    store.bucket = CarelessBucket(store.bucket.url)
    with pytest.raises(StoreError, match="ignores If-None-Match"):
        build_word(store, Machine(), WordSpec(word="a"))
    assert machines.objects("word/*/*") == []


def test_the_builder_after_a_dead_one_of_another_machine_waits_for_what_it_promised(machines: Machines) -> None:
    bucket = machines["here"].bucket
    dead = Holder("1", "another cache", "host", 1, seconds=0.1)
    bucket.put(".claims/word-1/0", dead.spelled())
    with claimed(bucket, "word-1", "this cache", 0.2):
        assert [path.name for path in machines.objects(".claims/word-1/*")] == ["0", "1"]
    assert machines.objects(".claims/word-1/*") == []


def test_the_builder_after_a_dead_one_of_the_same_machine_does_not_wait(machines: Machines) -> None:
    bucket = machines["here"].bucket
    bucket.put(".claims/word-1/0", Holder("1", "this cache", "host", 1, seconds=3600).spelled())
    with claimed(bucket, "word-1", "this cache", 0.2):
        assert len(machines.objects(".claims/word-1/*")) == 2


def test_a_key_is_resolved_listed_and_checked_as_in_a_local_store(machines: Machines) -> None:
    word = build_word(machines["here"], Machine(), WordSpec(word="abc"))
    there = machines["there"]
    assert there.resolve(word.key[:10]).ref == there.resolve("word").ref == there.resolve(word.ref).ref == word.ref
    assert [artifact.ref for artifact in there.artifacts()] == [word.ref]
    found = there.resolve("word")
    assert (there.damage(found, digests=True), fetched(found)) == (None, ["word.txt"])
    with pytest.raises(RefError, match=r"file://.*seqmill ls"):
        there.resolve("nothing")


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped"])
def test_a_manifest_that_leads_out_of_the_cache_counts_as_absent(machines: Machines, name: str) -> None:
    word = build_word(machines["here"], Machine(), WordSpec(word="abc"))
    (path,) = machines.objects("word/*/manifest.json")
    path.write_text(path.read_text().replace("word.txt", name))
    assert machines["there"].find(word.kind, word.key) is None


def test_one_bucket_has_one_cache_folder_and_another_has_another(tmp_path: Path) -> None:
    folders = [
        cache_folder(url, tmp_path, endpoint)
        for url, endpoint in [("s3://a/b", None), ("s3://a/b/", None), ("s3://a-b", None), ("s3://a/b", "http://127.0.0.1:1")]
    ]
    assert [folders.index(folder) for folder in folders] == [0, 0, 2, 3]
    assert [is_url(text) for text in ("s3://a", "file:///a", "/a", "a", "C:/a", "http://a")] == [True, True, *[False] * 4]


@pytest.mark.parametrize("name", ["manifest.json", "large/../../escaped", ""])
def test_a_file_that_is_no_plain_one_makes_a_manifest_absent(machines: Machines, name: str) -> None:
    word = build_word(machines["here"], Machine(), WordSpec(word="abc"))
    (path,) = machines.objects("word/*/manifest.json")
    path.write_text(path.read_text().replace("word.txt", name))
    assert machines["there"].find(word.kind, word.key) is None


def test_a_digest_that_leads_out_of_the_cache_makes_a_manifest_absent(machines: Machines) -> None:
    """It would name the file on its way."""
    word = build_word(machines["here"], Machine(), WordSpec(word="abc"))
    (path,) = machines.objects("word/*/manifest.json")
    path.write_text(path.read_text().replace(word.entry("word.txt").digest, "/../../../kept"))
    kept = machines.folder / "kept"
    kept.write_text("mine")
    found = machines["there"].find(word.kind, word.key)
    with contextlib.suppress(StoreError):
        assert found is None or found.file("word.txt")
    assert (found, kept.read_text()) == (None, "mine")


def test_a_shard_of_a_kind_that_is_none_makes_a_manifest_absent(machines: Machines) -> None:
    whole = spell(machines["here"], "abc")
    (path,) = machines.objects("letters/*/manifest.json")
    path.write_text(path.read_text().replace('"kind": "letters-shard"', '"kind": "../letters-shard"'))
    assert machines["there"].find(whole.kind, whole.key) is None


def test_a_large_object_that_is_damaged_is_replaced(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "SHOWN_BYTES", 1)
    build_word(machines["here"], Machine(), WordSpec(word="abc"))
    (path,) = machines.objects("word/*/*/word.txt")
    path.write_text("abd")
    with pytest.raises(StoreError, match="set aside"):
        build_word(machines["there"], Machine(), WordSpec(word="abc")).file("word.txt")
    build_word(machines["here"], Machine(), WordSpec(word="abc"))
    assert build_word(machines["third"], Machine(), WordSpec(word="abc")).file("word.txt").read_text() == "abc"


def test_a_cache_that_was_damaged_is_found_and_mended_by_verify(machines: Machines) -> None:
    word = build_word(machines["here"], Machine(), WordSpec(word="abc"))
    word.file("word.txt").write_text("abd")
    assert machines["here"].damage(word, digests=True) is None
    assert word.file("word.txt").read_text() == "abc"


def test_a_server_that_ignores_conditions_is_refused_before_anything_is_built(machines: Machines) -> None:
    store = machines["here"]
    store.bucket = CarelessBucket(store.bucket.url)
    with pytest.raises(StoreError, match="ignores If-None-Match"):
        build_word(store, Machine(), WordSpec(word="a"))
    assert BUILDS == []


@pytest.mark.parametrize(("url", "endpoint"), [("s3://me:planted@bucket/x", None), ("s3://bucket", "http://me:planted@host")])
def test_credentials_in_an_address_are_refused_and_not_repeated(tmp_path: Path, url: str, endpoint: str | None) -> None:
    with pytest.raises(SettingsError, match="leave them out") as caught:
        SharedStore(url, tmp_path, endpoint=endpoint)
    assert "planted" not in str(caught.value)
