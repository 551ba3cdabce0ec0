"""Why an artifact is built, as its manifest keeps it, on three small stages one behind the other."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import Field

from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, stage, unkeyed
from tasks.store.origin import Usage, commit_of, folder_bytes
from tasks.store.reason import differences, listed


class PageSpec(Spec):
    text: str = Field("a", description="what it says")
    url: str = unkeyed("here", description="where it is from")


class CopySpec(Spec):
    times: int = Field(1, description="how often")


ONCE = CopySpec()


@stage("page", revision=1, identify_source=lambda spec, store, machine: f"sha256:{spec.text}")
def build_page(work: Work, spec: PageSpec) -> Built:
    (work.folder / "text").write_text(spec.text)
    return Built()


@stage("copies", revision=1)
def build_copies(work: Work, spec: CopySpec, page: Artifact) -> Built:
    (work.scratch / "notes").write_text("12345")
    (work.folder / "text").write_text(page.file("text").read_text() * spec.times)
    return Built()


@stage("sum", revision=1)
def build_sum(work: Work, spec: CopySpec, copies: Artifact) -> Built:
    (work.folder / "text").write_text(str(len(copies.file("text").read_text())) * spec.times)
    return Built()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def built(store: ArtifactStore, page: PageSpec, copies: CopySpec, total: CopySpec = ONCE, recipe: str = "mine") -> Artifact:
    machine = replace(Machine(), recipe=recipe)
    first = build_page(store, machine, page)
    return build_sum(store, machine, total, copies=build_copies(store, machine, copies, page=first))


def reason(artifact: Artifact) -> str:
    return str(artifact.manifest.produced_by["reason"])


def test_the_first_of_a_kind_says_that_it_is_the_first(store: ArtifactStore) -> None:
    total = built(store, PageSpec(), CopySpec())
    assert reason(total) == "no sum in the store"
    assert total.manifest.produced_by["nearest"] is None
    assert [reason(found) for found in store.artifacts("page")] == ["no page in the store"]


def test_a_change_is_told_by_its_field_and_followed_downstream(store: ArtifactStore) -> None:
    before = built(store, PageSpec(), CopySpec())
    after = built(store, PageSpec(), CopySpec(times=2), CopySpec(times=3))
    assert reason(list(store.artifacts("copies"))[-1]) == "spec.times 1 -> 2"
    own, upstream = reason(after).split("; ")
    assert own == "spec.times 1 -> 3"
    assert upstream.startswith(f"inputs.copies {before.manifest.identity['inputs']['copies'][:12]}… -> ")
    assert upstream.endswith(" because copies.times 1 -> 2")
    assert after.manifest.produced_by["nearest"] == before.ref


def test_a_change_two_stages_up_is_told_by_its_source(store: ArtifactStore) -> None:
    built(store, PageSpec(), CopySpec())
    after = built(store, PageSpec(text="bb"), CopySpec())
    assert reason(after).endswith("because page.source sha256:a -> sha256:bb, page.text a -> bb")


def test_pages_of_another_address_are_no_versions_of_each_other(store: ArtifactStore) -> None:
    built(store, PageSpec(), CopySpec())
    built(store, PageSpec(text="bb", url="there"), CopySpec())
    assert reason(list(store.artifacts("page"))[-1]) == "the store has no bytes of sha256:bb"


def test_of_artifacts_equally_near_the_recipes_own_is_named(store: ArtifactStore) -> None:
    own = built(store, PageSpec(), CopySpec(), CopySpec(times=2), recipe="mine")
    built(store, PageSpec(), CopySpec(), CopySpec(times=3), recipe="yours")
    assert built(store, PageSpec(), CopySpec(), CopySpec(times=4)).manifest.produced_by["nearest"] == own.ref


def test_a_revision_is_a_reason(store: ArtifactStore) -> None:
    page = build_page(store, Machine(), PageSpec())
    build_copies(store, Machine(), CopySpec(), page=page)
    again = stage("copies", revision=2)(build_copies.build)(store, Machine(), CopySpec(), page=page)
    assert reason(again) == "revision 1 -> 2"


def test_a_damaged_artifact_is_built_again_for_what_was_wrong_with_it(store: ArtifactStore) -> None:
    page = build_page(store, Machine(), PageSpec())
    page.file("text").unlink()
    assert reason(build_page(store, Machine(), PageSpec())) == "damaged: text is missing, its manifest says 1"


def test_an_upstream_that_the_store_lost_is_told_by_its_digests_alone(store: ArtifactStore) -> None:
    built(store, PageSpec(), CopySpec())
    for artifact in list(store.artifacts("copies")):
        artifact.path.rename(store.root / "elsewhere")
    assert "because" not in reason(built(store, PageSpec(), CopySpec(times=2)))


def test_a_manifest_tells_who_built_it_with_what_and_what_it_took(store: ArtifactStore) -> None:
    told = built(store, PageSpec(), CopySpec()).manifest.produced_by
    assert told["recipe"] == "mine"
    assert {"host", "python", "packages", "started", "seconds", "peak_rss_bytes"} <= set(told)
    assert next(store.artifacts("copies")).manifest.produced_by["scratch_bytes"] == 5


def test_a_checkout_has_a_commit_and_says_whether_it_was_changed(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == {}

    def git(*arguments: str) -> str:
        options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.check_output(["git", "-C", str(tmp_path), *options, *arguments], text=True).strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "--quiet", "-m", "first")
    assert commit_of(tmp_path) == {"commit": git("rev-parse", "HEAD"), "is_dirty": False}
    (tmp_path / "file").write_text("b")
    assert commit_of(tmp_path)["is_dirty"]


def test_shards_found_are_told_apart_from_shards_built(store: ArtifactStore) -> None:
    from tests.store.test_stage import ListSpec, WordSpec, build_letters, build_word

    word = build_word(store, Machine(), WordSpec(word="abc"))
    first = build_letters(store, Machine(), ListSpec(), word=word).manifest.produced_by
    assert (first["num_shards_built"], first["num_bytes_built"]) == (3, 3)
    later = Usage()
    later.started_ns += 1_000_000_000
    assert later.shards_built(store.root, store.resolve("letters").manifest.shards) == {
        "num_shards_built": 0,
        "num_bytes_built": 0,
    }


def test_a_file_that_has_another_name_gives_no_room_back(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("123")
    assert folder_bytes(tmp_path / "folder") == 3
    (tmp_path / "other").hardlink_to(tmp_path / "folder" / "file")
    assert folder_bytes(tmp_path / "folder") == 0


def test_many_causes_are_counted() -> None:
    assert listed(list("abcdef")) == "a, b, c, d and 2 more"


def test_differences_are_named_by_field() -> None:
    before = {"kind": "a", "revision": 1, "spec": {"x": 1, "y": {"z": 2}}, "inputs": {"b": "0123456789abcdef01234567"}}
    after = {"kind": "a", "revision": 2, "spec": {"x": 1, "y": {"z": 3}}, "inputs": {"b": "f123456789abcdef01234567"}}
    assert list(differences(before, after)) == [
        "inputs.b 0123456789ab… -> f123456789ab…",
        "revision 1 -> 2",
        "spec.y.z 2 -> 3",
    ]
