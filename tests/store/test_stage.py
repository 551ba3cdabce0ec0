"""The promises of the store, each tried on two small stages: one that reads no artifact, one that lists shards."""

import multiprocessing
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from tasks.errors import RefError, StoreError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, shard_entry, stage, unkeyed

BUILDS: list[str] = []


class WordSpec(Spec):
    word: str = Field(description="what the file holds")
    times: int | None = Field(None, description="how often; absent: once")
    url: str = unkeyed("", description="where it is from")


@stage("word", revision=1)
def build_word(work: Work, spec: WordSpec) -> Built:
    BUILDS.append(spec.word)
    (work.scratch / "notes").write_text("not part of the artifact")
    (work.folder / "word.txt").write_text(spec.word * (spec.times or 1))
    return Built({"num_characters": len(spec.word)})


class ListSpec(Spec):
    pass


@stage("letter-shard", revision=1)
def build_letter(work: Work, spec: WordSpec) -> Built:
    (work.folder / "letter").write_text(spec.word)
    return Built()


def letter(root: Path, word: str) -> Artifact:
    return build_letter(ArtifactStore(root), Machine(), WordSpec(word=word))


@stage("letters", revision=1)
def build_letters(work: Work, spec: ListSpec, word: Artifact) -> Built:
    text = word.file("word.txt").read_text()
    shards = work.machine.map_shards(partial(letter, work.store.root), list(text), "letters")
    return Built({"num": len(text)}, shards=tuple(shard_entry(f"train/{i:05}", shard) for i, shard in enumerate(shards)))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    BUILDS.clear()
    return ArtifactStore(tmp_path / "store")


def test_the_second_call_finds_what_the_first_built(store: ArtifactStore) -> None:
    first = build_word(store, Machine(), WordSpec(word="a"))
    second = build_word(store, Machine(), WordSpec(word="a"))
    assert (first.found, second.found, BUILDS) == (False, True, ["a"])
    assert first.file("word.txt").read_text() == "a"
    assert sorted(path.name for path in first.path.iterdir()) == ["manifest.json", "word.txt"]


@pytest.mark.parametrize("spec", [WordSpec(word="b"), WordSpec(word="a", times=2)])
def test_every_keyed_field_changes_the_key(store: ArtifactStore, spec: WordSpec) -> None:
    assert build_word(store, Machine(), spec).key != build_word(store, Machine(), WordSpec(word="a")).key


def test_an_absent_field_changes_no_key() -> None:
    assert WordSpec(word="a").identity() == {"word": "a"}


def test_an_unkeyed_field_changes_no_key_and_is_recorded(store: ArtifactStore) -> None:
    first = build_word(store, Machine(), WordSpec(word="a", url="here"))
    second = build_word(store, Machine(), WordSpec(word="a", url="there"))
    assert first.key == second.key
    assert first.manifest.produced_by["unkeyed"] == {"url": "here"}


def test_resources_do_not_affect_the_content(store: ArtifactStore, tmp_path: Path) -> None:
    contents = set()
    for workers in (1, 2):
        other = ArtifactStore(tmp_path / str(workers))
        machine = Machine(num_workers=workers)
        contents.add(build_letters(other, machine, ListSpec(), word=build_word(other, machine, WordSpec(word="abc"))).content)
    assert len(contents) == 1


def test_inputs_enter_by_content_so_a_rebuild_with_equal_bytes_stops_there(store: ArtifactStore) -> None:
    once = build_word(store, Machine(), WordSpec(word="aa"))
    twice = build_word(store, Machine(), WordSpec(word="a", times=2))
    assert once.key != twice.key
    assert once.content == twice.content
    built = build_letters(store, Machine(), ListSpec(), word=once)
    assert build_letters(store, Machine(), ListSpec(), word=twice).found
    assert built.manifest.identity["inputs"] == {"word": once.content}


def test_a_kind_a_revision_and_a_source_change_the_key() -> None:
    spec = WordSpec(word="a")
    identities = [
        build_word.identity(spec, {}),
        build_word.identity(spec, {}, "sha256:1"),
        stage("word", revision=2)(build_word.build).identity(spec, {}),
        build_letter.identity(spec, {}),
    ]
    assert len({str(identity) for identity in identities}) == 4


@pytest.mark.parametrize("damage", ["remove", "cut", "manifest"])
def test_a_damaged_artifact_is_set_aside_and_rebuilt_never_served(store: ArtifactStore, damage: str) -> None:
    artifact = build_word(store, Machine(), WordSpec(word="abc"))
    path = artifact.path / ("manifest.json" if damage == "manifest" else "word.txt")
    path.unlink() if damage == "remove" else path.write_text("x")
    again = build_word(store, Machine(), WordSpec(word="abc"))
    assert (again.found, again.file("word.txt").read_text()) == (False, "abc")
    assert len(list((store.root / ".damaged").iterdir())) == 1


def test_other_bytes_of_the_same_size_are_seen_when_digests_are_asked_for(store: ArtifactStore) -> None:
    artifact = build_word(store, Machine(), WordSpec(word="abc"))
    (artifact.path / "word.txt").write_text("abd")
    assert store.damage(artifact) is None
    assert store.damage(artifact, digests=True) == "word.txt has the digest a52d159f262b, its manifest says ba7816bf8f01"


def test_a_lost_shard_alone_is_rebuilt(store: ArtifactStore) -> None:
    word = build_word(store, Machine(), WordSpec(word="abc"))
    letters = build_letters(store, Machine(), ListSpec(), word=word)
    lost, kept = list(letters.shards())[:2]
    letters.shard_file(lost, "letter").unlink()
    before = letters.shard_file(kept, "letter").stat().st_ino
    again = build_letters(store, Machine(), ListSpec(), word=word)
    assert (again.found, again.content) == (False, letters.content)
    assert again.shard_file(kept, "letter").stat().st_ino == before
    assert again.shard_file(lost, "letter").read_text() == "a"


@stage("dies", revision=1)
def build_and_die_once(work: Work, spec: WordSpec) -> Built:
    tries = work.scratch / "tries"
    tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
    if tries.read_text() == "x":
        raise RuntimeError("killed")
    (work.folder / "tries.txt").write_text(tries.read_text())
    return Built()


def test_a_build_that_fails_leaves_no_artifact_and_the_next_goes_on_from_its_staging(store: ArtifactStore) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        build_and_die_once(store, Machine(), WordSpec(word="a"))
    assert list(store.artifacts()) == []
    assert build_and_die_once(store, Machine(), WordSpec(word="a")).file("tries.txt").read_text() == "xx"


@stage("slow", revision=1)
def build_alone(work: Work, spec: WordSpec) -> Built:
    with (work.store.root / "builds").open("a") as builds:
        builds.write(f"{os.getpid()}\n")
    (work.folder / "f").write_text("x")
    return Built()


def _build_alone(root: Path) -> bool:
    return build_alone(ArtifactStore(root), Machine(), WordSpec(word="a")).found


def test_of_many_processes_at_once_one_builds_and_the_others_find(store: ArtifactStore) -> None:
    store.root.mkdir(parents=True)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_build_alone, [store.root] * 8)
    assert found.count(False) == 1
    assert len((store.root / "builds").read_text().splitlines()) == 1


def test_a_folder_that_cannot_be_a_store_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot be written .*--store"):
        build_word(ArtifactStore(tmp_path / "file"), Machine(), WordSpec(word="a"))


def test_a_staging_folder_that_cannot_be_made_is_an_error_that_names_it(store: ArtifactStore) -> None:
    store.root.mkdir(parents=True)
    (store.root / ".staging").write_text("a file, where a folder is to be")
    with pytest.raises(StoreError, match=r"word/.{12}: .*\.staging.*: Not a directory; mend that and run again"):
        build_word(store, Machine(), WordSpec(word="a"))


def test_a_spec_refuses_an_unknown_field_a_wrong_type_and_a_change() -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        WordSpec(word="a", wrod="b")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="int_type"):
        WordSpec(word="a", times="2")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="frozen"):
        WordSpec(word="a").word = "b"


def test_a_reference_is_a_kind_a_key_or_the_start_of_one(store: ArtifactStore) -> None:
    first = build_word(store, Machine(), WordSpec(word="a"))
    second = build_word(store, Machine(), WordSpec(word="b"))
    assert store.resolve(f"word/{first.key[:8]}").key == first.key
    assert store.resolve(second.key[:10]).key == second.key
    assert store.resolve("word").kind == "word"
    for ref in ("nothing", "word/ffff", "word/"):
        with pytest.raises(RefError, match="seqmill ls"):
            store.resolve(ref)


def test_an_artifact_that_was_copied_to_another_key_is_not_found_there(store: ArtifactStore) -> None:
    first, other = (build_word(store, Machine(), WordSpec(word=word)) for word in "ab")
    shutil.rmtree(other.path)
    shutil.copytree(first.path, other.path)
    again = build_word(store, Machine(), WordSpec(word="b"))
    assert (again.found, again.file("word.txt").read_text()) == (False, "b")


@stage("stuck", revision=1)
def build_stuck(work: Work, spec: ListSpec) -> Built:
    """As on NFS, where a file that is open in another process is removed only by name."""
    (work.folder / ".scratch").write_text("no folder")
    return Built()


def test_scratch_that_cannot_be_removed_does_not_become_the_artifact_s(store: ArtifactStore) -> None:
    with pytest.raises(StoreError, match="mend that and run again"):
        build_stuck(store, Machine(), ListSpec())
    assert list(store.artifacts()) == []
