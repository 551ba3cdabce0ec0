"""Two builds of one key have other bytes, as a model that is trained twice: a cache that has both mixes nothing."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.provenance import provenance
from flows.verify import verify
from tasks.corpus.shards import load_shards
from tasks.errors import StoreError
from tasks.machine import Machine
from tasks.store import Artifact, Built, SharedStore, Work, digest_bytes, shard_entry, stage
from tasks.store.lease import end_lease
from tasks.store.trim import trim
from tests.store.shared_build import QUICK, WordSpec, build_drawn

Machines = Callable[..., SharedStore]


@pytest.fixture
def machine(tmp_path: Path) -> Machines:
    def opened(name: str, cache_bytes: int | None = None) -> SharedStore:
        url = f"file://{tmp_path / 'bucket'}"
        return SharedStore(url, tmp_path / name, claim_seconds=0.2, patience=QUICK, cache_bytes=cache_bytes)

    return opened


def drawn(store: SharedStore) -> Artifact:
    return build_drawn(store, Machine(), WordSpec(word="a"))


def built_anew(machine: Machines, old: Artifact) -> Artifact:
    """The same key, set aside and built by a third machine."""
    machine("third").set_aside(old.kind, old.key, "for this test")
    new = drawn(machine("third"))
    assert (new.key, new.content == old.content) == (old.key, False)
    return new


def bytes_of(artifact: Artifact) -> list[bytes]:
    return [artifact.file(name).read_bytes() for name in ("a", "b")]


def test_a_copy_of_what_was_built_anew_elsewhere_is_not_taken_for_it(machine: Machines) -> None:
    old = drawn(machine("here"))
    there = machine("there").resolve(old.ref)
    assert there.file("a").read_bytes() == old.file("a").read_bytes()  # b is not yet fetched
    new = built_anew(machine, old)
    now = drawn(machine("there"))
    assert (now.found, now.content) == (True, new.content)
    assert bytes_of(now) == bytes_of(new) != bytes_of(old)
    assert now.read("a", 0, 16) == new.read("a", 0, 16)
    assert machine("there").damage(now, digests=True) is None
    assert bytes_of(machine("there").resolve(old.ref)) == bytes_of(new)


def test_a_path_that_was_given_out_leads_to_the_same_bytes_for_ever(machine: Machines) -> None:
    old = drawn(machine("here"))
    held = machine("there").resolve(old.ref)
    path, data = held.file("a"), held.file("a").read_bytes()
    now = built_anew(machine, old) and drawn(machine("there"))
    assert bytes_of(now)[0] != data
    assert path.read_bytes() == data == held.file("a").read_bytes()
    assert held.read("a", 0, 16) == data


def test_what_is_built_anew_on_this_machine_lies_beside_what_it_reads(machine: Machines) -> None:
    old = drawn(machine("third"))
    held = machine("here").resolve(old.ref)
    path, data = held.file("a"), held.file("a").read_bytes()
    machine("third").set_aside(old.kind, old.key, "for this test")
    new = drawn(machine("here"))  # has a, but not b
    assert not new.found
    assert path.read_bytes() == data
    assert bytes_of(new) == [new.path.joinpath(name).read_bytes() for name in ("a", "b")] != bytes_of(old)
    found = drawn(machine("here"))
    assert (found.found, bytes_of(found), found.path) == (True, bytes_of(new), new.path)
    assert bytes_of(drawn(machine("there"))) == bytes_of(new)
    assert [one.content for one in machine("here").artifacts("drawn")] == [new.content]


def test_what_lies_beside_is_uploaded_again_where_the_bucket_loses_it(machine: Machines) -> None:
    old = drawn(machine("there"))
    machine("here").resolve(old.ref).file("a")
    machine("third").set_aside(old.kind, old.key, "for this test")
    new = drawn(machine("here"))
    machine("third").set_aside(old.kind, old.key, "for this test")
    again = drawn(machine("here"))
    assert (again.found, again.content) == (True, new.content)
    assert bytes_of(drawn(machine("fourth"))) == bytes_of(new)


def test_a_cache_of_an_earlier_release_has_what_its_manifest_says(machine: Machines) -> None:
    old = drawn(machine("here"))
    there = machine("there").resolve(old.ref)
    there.file("a")
    machine("there").lock_path(old.kind, old.key).write_bytes(b"")
    new = built_anew(machine, old)
    assert bytes_of(drawn(machine("there"))) == bytes_of(new)


def test_a_note_with_the_whole_content_is_read_as_one_with_its_beginning(machine: Machines) -> None:
    old = drawn(machine("here"))
    there = machine("there").resolve(old.ref)
    assert there.file("a").parent.name == old.key
    note = machine("there").lock_path(old.kind, old.key)
    assert note.read_text() == old.content[:16]
    note.write_text(old.content)
    assert (there.file("a").parent.name, note.read_text()) == (old.key, old.content)


def test_a_trim_takes_both_once_nobody_uses_them(machine: Machines) -> None:
    old = drawn(machine("here"))
    held = machine("there").resolve(old.ref)
    held.file("a")
    built_anew(machine, old)
    store = machine("there")
    now = drawn(store)
    assert bytes_of(now)
    assert trim(store.root, 0).number == 0  # a living process has used them
    end_lease(store.root)
    for path in (*store.root.glob("drawn/*"), *store.root.glob(".locks/*")):
        os.utime(path, (1e9, 1e9))
    assert trim(store.root, 0).number == 2
    assert list(store.root.glob("drawn/*")) == []
    assert bytes_of(drawn(machine("there"))) == bytes_of(now)


def test_where_the_bytes_of_the_first_are_gone_its_user_is_told(machine: Machines, tmp_path: Path) -> None:
    old = drawn(machine("here"))
    held = machine("there").resolve(old.ref)
    new = built_anew(machine, old)
    for path in (tmp_path / "bucket" / old.ref / str(old.manifest.produced_by["place"])).iterdir():
        path.unlink()
    with pytest.raises(StoreError, match="run again"):
        held.file("a")
    assert bytes_of(drawn(machine("there"))) == bytes_of(new)


@stage("drawings-shard", revision=1)
def build_drawing(work: Work, spec: WordSpec) -> Built:
    (work.folder / "a").write_bytes(os.urandom(16))
    return Built()


@stage("drawings", revision=1)
def build_drawings(work: Work, spec: WordSpec) -> Built:
    return Built(shards=(shard_entry("train/0", build_drawing(work.store, Machine(), spec)),))


def test_a_list_of_shards_that_were_built_anew_is_not_lost_where_the_old_ones_are_known(machine: Machines) -> None:
    old, new = with_an_old_shard(machine)
    now = machine("there").resolve(old.ref)
    (entry,) = now.shards()
    assert now.shard_file(entry, "a").read_bytes() == new.shard_file(entry, "a").read_bytes()
    assert machine("fourth").find(new.kind, new.key)


def with_an_old_shard(machine: Machines) -> tuple[Artifact, Artifact]:
    """A list of shards that was built anew elsewhere, on a machine that has the old shard; the old list and the new."""
    spec = WordSpec(word="a")
    old = build_drawings(machine("here"), Machine(), spec)
    (entry,) = machine("there").resolve(old.ref).shards()
    assert machine("there").resolve(old.ref).shard_file(entry, "a").read_bytes()
    for kind, key in ((old.kind, old.key), (entry.kind, entry.key)):
        machine("third").set_aside(kind, key, "for this test")
    return old, build_drawings(machine("third"), Machine(), spec)


def test_no_list_names_a_shard_that_only_this_machine_has(machine: Machines) -> None:
    shard = build_drawing(machine("there"), Machine(), WordSpec(word="a"))
    machine("third").set_aside(shard.kind, shard.key, "for this test")
    new = build_drawings(machine("third"), Machine(), WordSpec(word="a"))
    machine("third").set_aside(new.kind, new.key, "for this test")
    with pytest.raises(StoreError, match="run again"):
        build_drawings(machine("there"), Machine(), WordSpec(word="a"))
    again = build_drawings(machine("there"), Machine(), WordSpec(word="a"))
    (entry,) = again.shards()
    assert entry.content == next(new.shards()).content
    assert machine("fourth").resolve(again.ref).shard_file(entry, "a").read_bytes() == again.shard_file(entry, "a").read_bytes()


def test_what_was_built_anew_is_verified_as_it_is_now(machine: Machines) -> None:
    with_an_old_shard(machine)
    assert verify(machine("there"), [], Machine()).problems == ()


def test_the_shards_of_a_list_are_those_that_it_names(machine: Machines) -> None:
    _, new = with_an_old_shard(machine)
    entries = list(machine("there").resolve(new.ref).shards())
    (shard,) = load_shards(machine("there"), entries)
    assert shard.content == entries[0].content
    assert digest_bytes(shard.file("a").read_bytes()) == shard.entry("a").digest


def test_what_is_told_of_a_list_is_told_of_the_shards_that_it_names(machine: Machines) -> None:
    _, new = with_an_old_shard(machine)
    (entry,) = new.shards()
    assert provenance(machine("there"), new)["subject"] == provenance(machine("third"), new)["subject"]
    machine("third").set_aside(entry.kind, entry.key, "for this test")
    build_drawing(machine("fifth"), Machine(), WordSpec(word="a"))
    assert machine("fourth").listed([entry, entry]) == [None, None]


CACHES = ("here", "there", "third")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from(CACHES), st.just("")),
        st.tuples(st.just("read"), st.integers(0, 9), st.sampled_from(["a", "b"])),
        st.tuples(st.just("open"), st.integers(0, 9), st.sampled_from(["a", "b"])),
        st.tuples(st.just("set aside"), st.sampled_from(CACHES), st.just("")),
        st.tuples(st.just("sweep"), st.just(""), st.just("")),
    ),
    max_size=20,
)


@given(steps=STEPS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whoever_holds_a_build_reads_its_bytes_or_is_told_that_they_are_gone(
    tmp_path: Path, steps: list[tuple[str, object, str]]
) -> None:
    folder = tmp_path / secrets.token_hex(8)
    held: list[Artifact] = []
    paths: dict[Path, bytes] = {}

    def opened(name: object) -> SharedStore:
        return SharedStore(f"file://{folder / 'bucket'}", folder / str(name), claim_seconds=0.2, patience=QUICK)

    for what, which, name in [("ask", "here", ""), *steps]:
        artifact = held[which % len(held)] if isinstance(which, int) else None
        if what == "ask":
            held.append(drawn(opened(which)))
        elif what == "set aside":
            opened(which).set_aside("drawn", held[0].key, "for this test")
        elif what == "sweep":  # as a collector, of what no manifest names
            standing = opened("here").load("drawn", held[0].key)
            for place in folder.glob(f"bucket/{held[0].ref}/*/"):
                if not standing or place.name != standing.manifest.produced_by["place"]:
                    shutil.rmtree(place)
        elif artifact:
            with contextlib.suppress(StoreError):
                path = artifact.file(name)
                data = path.read_bytes() if what == "open" else artifact.read(name, 0, 16)
                assert digest_bytes(data) == artifact.entry(name).digest
                paths[path] = data
        for path, data in paths.items():
            assert not path.exists() or path.read_bytes() == data
