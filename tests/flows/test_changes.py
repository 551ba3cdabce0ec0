"""Whether a recipe's sources still hold the bytes that were last seen."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.changes import Look, Seen, last_seen, look, memory, remember
from flows.dag import Node
from tasks.corpus.archive import ArchiveSpec, build_archive
from tasks.machine import Machine
from tasks.store import ArtifactStore, digest_bytes
from tests.corpus.http_server import Loopback, Published, serving

OLD, NEW = b"old bytes", b"other bytes"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def server() -> Iterator[Loopback]:
    with serving() as loopback:
        yield loopback


def archive(url: str, **fields: str) -> list[Node]:
    return [Node("archive", build_archive, ArchiveSpec(url=url, **fields), {})]


def looks(store: ArtifactStore, nodes: list[Node], last: Look | None = None) -> Look:
    return look(nodes, last.seen if last else {}, store, Machine())


def changed(found: Look) -> list[tuple[str | None, str | None]]:
    return [(change.old, change.new) for change in found.changes]


def of(data: bytes) -> str:
    return f"sha256:{digest_bytes(data)}"


def test_the_first_look_finds_no_change(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "corpus").write_bytes(OLD)
    first = looks(store, archive(str(tmp_path / "corpus")))
    assert (changed(first), first.seen) == ([], {"archive": Seen(of(OLD), of(OLD))})


def test_a_local_file_that_was_only_touched_is_no_change(store: ArtifactStore, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    path.write_bytes(OLD)
    first = looks(store, archive(str(path)))
    os.utime(path, (1, 1))
    assert changed(looks(store, archive(str(path)), first)) == []


def test_a_local_file_of_other_bytes_is_a_change_with_both_digests_once(store: ArtifactStore, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    path.write_bytes(OLD)
    first = looks(store, archive(str(path)))
    path.write_bytes(NEW)
    second = looks(store, archive(str(path)), first)
    assert changed(second) == [(of(OLD), of(NEW))]
    assert changed(looks(store, archive(str(path)), second)) == []


def test_a_published_file_under_the_same_validator_is_not_fetched(store: ArtifactStore, server: Loopback) -> None:
    server.files["/a"] = Published(OLD)
    first = looks(store, archive(server.url("/a")))
    assert changed(looks(store, archive(server.url("/a")), first)) == []
    assert server.asked("GET") == []


def test_a_published_file_that_was_only_touched_is_fetched_once_and_no_change(store: ArtifactStore, server: Loopback) -> None:
    server.files["/a"] = Published(OLD)
    build_archive(store, Machine(), ArchiveSpec(url=server.url("/a")))
    first = looks(store, archive(server.url("/a")))
    server.files["/a"] = Published(OLD, etag='"touched"')
    second = looks(store, archive(server.url("/a")), first)
    assert changed(second) == []
    assert changed(looks(store, archive(server.url("/a")), second)) == []
    assert len(server.asked("GET")) == 2


def test_a_published_file_of_other_bytes_is_a_change_and_the_run_finds_it_in_the_store(
    store: ArtifactStore, server: Loopback
) -> None:
    server.files["/a"] = Published(OLD)
    build_archive(store, Machine(), ArchiveSpec(url=server.url("/a")))
    first = looks(store, archive(server.url("/a")))
    server.files["/a"] = Published(NEW)
    assert changed(looks(store, archive(server.url("/a")), first)) == [(of(OLD), of(NEW))]
    assert build_archive(store, Machine(), ArchiveSpec(url=server.url("/a"))).found


def test_other_bytes_in_place_of_some_that_were_never_fetched_are_a_change(store: ArtifactStore, server: Loopback) -> None:
    server.files["/a"] = Published(OLD)
    first = looks(store, archive(server.url("/a")))
    server.files["/a"] = Published(NEW)
    assert changed(looks(store, archive(server.url("/a")), first)) == [(None, of(NEW))]


def test_bytes_that_the_recipe_pins_are_not_asked_for(store: ArtifactStore, server: Loopback) -> None:
    nodes = archive(server.url("/a"), sha256=str(digest_bytes(OLD)))
    assert looks(store, nodes).seen == {"archive": Seen(of(OLD), of(OLD))}
    assert server.requests == []


def test_a_source_that_cannot_be_asked_hides_no_other(store: ArtifactStore, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    path.write_bytes(OLD)
    nodes = [*archive(str(tmp_path / "gone")), Node("conversations", build_archive, ArchiveSpec(url=str(path)), {})]
    first = looks(store, nodes)
    path.write_bytes(NEW)
    second = looks(store, nodes, first)
    assert changed(second) == [(of(OLD), of(NEW))]
    assert "no such file" in str(second.errors[0])


def test_what_was_seen_is_remembered_and_a_torn_memory_is_none(tmp_path: Path) -> None:
    path = tmp_path / ".watch" / "demo.json"
    assert last_seen(path) == {}
    remember(path, {"archive": Seen("etag:1 9", None)})
    assert last_seen(path) == {"archive": Seen("etag:1 9", None)}
    path.write_text('{"archive": ')
    assert last_seen(path) == {}


def test_other_overrides_and_another_file_of_the_same_name_have_a_memory_of_their_own(tmp_path: Path) -> None:
    asked = [(tmp_path / "a.yaml", {}), (tmp_path / "b.yaml", {}), (tmp_path / "a.yaml", {"archive.url": "other"})]
    paths = []
    for recipe, overrides in asked:
        with memory(tmp_path, "demo", recipe, overrides) as path:
            paths.append(path)
    assert len({path.name for path in paths}) == 3
    with memory(tmp_path, "demo", tmp_path / "a.yaml", {}) as path:
        assert path == paths[0]


def test_two_looks_at_once_tell_a_change_once(store: ArtifactStore, tmp_path: Path) -> None:
    corpus, told = tmp_path / "corpus", []
    corpus.write_bytes(OLD)
    nodes = archive(str(corpus))

    def look_and_tell() -> None:
        with memory(tmp_path, "demo", tmp_path / "a.yaml", {}) as path:
            found = look(nodes, last_seen(path), store, Machine())
            told.extend(changed(found))
            remember(path, found.seen)

    look_and_tell()
    corpus.write_bytes(NEW)
    with memory(tmp_path, "demo", tmp_path / "a.yaml", {}):
        threads = [threading.Thread(target=look_and_tell) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert told == []
    for thread in threads:
        thread.join()
    assert told == [(of(OLD), of(NEW))]
