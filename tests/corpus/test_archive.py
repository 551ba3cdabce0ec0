"""The archive stage: what the bytes are, on files and on a real server; how they come is tested in test_fetch."""

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import ValidationError

from tasks.corpus.archive import ArchiveSpec, build_archive
from tasks.errors import DiskSpaceError, SourceError, StoreError
from tasks.machine import Machine
from tasks.store import ArtifactStore
from tests.corpus.http_server import Loopback, Published
from tests.corpus.publishing import DATA, MD5, OTHER, SHA256, bytes_of, get, publish


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(DATA)
    return path


# Local files


def test_a_local_file_is_copied_and_both_digests_are_recorded(store: ArtifactStore, local: Path) -> None:
    archive = get(store, local)
    assert bytes_of(archive) == DATA
    assert archive.stats == {"num_bytes": len(DATA), "sha256": SHA256, "md5": MD5}
    assert archive.manifest.identity["inputs"] == {"source": f"sha256:{SHA256}"}
    assert not archive.file("archive").samefile(local)


def test_the_same_bytes_elsewhere_are_the_same_archive(store: ArtifactStore, local: Path, tmp_path: Path) -> None:
    archive = get(store, local)
    moved = local.rename(tmp_path / "moved")
    again = get(store, f"file:{moved}")
    assert again.key == archive.key
    assert again.found


def test_a_changed_local_file_is_another_archive(store: ArtifactStore, local: Path) -> None:
    before = get(store, local)
    local.write_bytes(OTHER)
    assert get(store, local).key != before.key


@contextmanager
def full_after(num_bytes: int) -> Iterator[None]:
    """Files end at ``num_bytes``, as on a disk that is full then: a write takes what fits, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_disk_that_fills_up_in_the_last_write_leaves_no_archive(
    store: ArtifactStore, server: Loopback, local: Path, is_remote: bool
) -> None:
    source = publish(server, Published(DATA)) if is_remote else local
    with full_after(len(DATA) - 10), pytest.raises(StoreError, match="mend that and run again"):
        get(store, source, sha256=SHA256)
    assert bytes_of(get(store, source, sha256=SHA256)) == DATA


def test_a_local_file_that_is_not_there_is_said(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file; check the path"):
        get(store, tmp_path / "absent")
    with pytest.raises(SourceError, match="not a regular file"):
        get(store, tmp_path, sha256=SHA256)


def test_a_local_file_of_another_digest_is_refused_with_both(store: ArtifactStore, local: Path) -> None:
    with pytest.raises(SourceError, match=f"sha256 {SHA256[:12]} differs from the 000000000000 that the recipe states"):
        get(store, local, sha256="0" * 64)
    with pytest.raises(SourceError, match=f"md5 {MD5[:12]} .* differs from the expected 000000000000; .* deleted"):
        get(store, local, md5="0" * 32)
    assert local.read_bytes() == DATA
    assert list(store.artifacts()) == []


def test_the_digest_of_another_corpus_does_not_find_that_corpus(store: ArtifactStore, local: Path, tmp_path: Path) -> None:
    get(store, local, sha256=SHA256)
    (tmp_path / "mine").write_bytes(OTHER)
    with pytest.raises(SourceError, match="leave sha256 out of the recipe"):
        get(store, tmp_path / "mine", sha256=SHA256)


def test_a_file_that_is_gone_is_found_by_its_digest(store: ArtifactStore, local: Path) -> None:
    first = get(store, local, sha256=SHA256)
    local.unlink()
    assert get(store, local, sha256=SHA256).key == first.key


def test_both_stated_digests_must_hold(store: ArtifactStore, local: Path) -> None:
    with pytest.raises(SourceError, match="md5"):
        get(store, local, sha256=SHA256, md5="0" * 32)


def test_a_file_larger_than_the_free_room_is_refused_before_its_first_byte(store: ArtifactStore, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    sparse.touch()
    size = shutil.disk_usage(tmp_path).free + (1 << 30)
    try:
        os.truncate(sparse, size)
    except OSError:
        pytest.skip("this file system holds no sparse file of that size")
    with pytest.raises(DiskSpaceError, match=rf"bytes free, {size:,} still to come"):
        get(store, sparse, md5=MD5)


@pytest.mark.parametrize("fields", [{"sha256": "abc"}, {"sha256": "g" * 64}, {"md5": SHA256}, {"url": "ftp://host/a"}])
def test_a_spec_that_cannot_be_is_refused_when_parsed(fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        ArchiveSpec(**{"url": "/a", **fields})


def test_a_digest_in_capitals_is_the_same_digest() -> None:
    assert ArchiveSpec(url="/a", sha256=SHA256.upper()).sha256 == SHA256


# The archive in the store under another key


@pytest.mark.parametrize("stated", [{"md5": MD5}, {"md5": MD5, "sha256": SHA256}])
def test_the_same_bytes_under_another_key_are_linked_not_fetched(
    store: ArtifactStore, server: Loopback, stated: dict[str, str]
) -> None:
    url = publish(server, Published(DATA))
    first = get(store, url)
    sent = server.num_bytes_sent
    adopted = get(store, url, **stated)
    assert adopted.key != first.key
    assert adopted.content == first.content
    assert adopted.file("archive").samefile(first.file("archive"))
    assert server.num_bytes_sent == sent


def test_a_damaged_archive_is_not_adopted(store: ArtifactStore, server: Loopback) -> None:
    url = publish(server, Published(DATA))
    first = get(store, url)
    first.file("archive").write_bytes(OTHER)
    assert bytes_of(get(store, url, md5=MD5)) == DATA


# On a server


@pytest.mark.parametrize(
    ("published", "source"),
    [
        (Published(DATA), f'etag:"{MD5}" 1024000'),
        (
            Published(DATA, etag=None, last_modified="Tue, 01 Oct 2024 00:00:00 GMT"),
            "last-modified:Tue, 01 Oct 2024 00:00:00 GMT 1024000 {url}",
        ),
        (Published(DATA, etag='"66fb1c80-fa000"'), 'etag:"66fb1c80-fa000" 1024000 {url}'),  # date and size, as nginx makes it
        (Published(DATA, refuses_head=True), f'etag:"{MD5}" 1024000'),
    ],
)
def test_without_a_digest_the_server_says_what_the_bytes_are(
    store: ArtifactStore, server: Loopback, published: Published, source: str
) -> None:
    url = publish(server, published)
    archive = get(store, url)
    assert bytes_of(archive) == DATA
    assert archive.manifest.identity["inputs"] == {"source": source.format(url=url)}


def test_a_server_that_says_nothing_of_the_bytes_is_asked_for_a_digest(store: ArtifactStore, server: Loopback) -> None:
    with pytest.raises(SourceError, match="state the sha256 or md5"):
        get(store, publish(server, Published(DATA, etag=None)))


def test_a_file_that_changes_on_the_server_is_another_archive(store: ArtifactStore, server: Loopback) -> None:
    url = publish(server, Published(DATA))
    before = get(store, url)
    publish(server, Published(OTHER))
    assert bytes_of(get(store, url)) == OTHER
    assert bytes_of(before) == DATA


def test_a_hub_file_comes_from_the_endpoint_of_this_machine(store: ArtifactStore, server: Loopback) -> None:
    server.files["/cdn/b"] = Published(DATA)
    path = "/api/v1/datasets/owner/name/repo?Source=SDK&Revision=master&FilePath=b"
    server.redirects[path] = (server.url("/cdn/b", host="localhost"), {})
    machine = Machine(endpoints={"modelscope": server.url("")})
    assert bytes_of(build_archive(store, machine, ArchiveSpec(url="modelscope://owner/name/b"))) == DATA


def test_a_hubs_own_sha256_is_the_identity_and_is_verified(store: ArtifactStore, server: Loopback) -> None:
    server.files["/cdn/b"] = Published(DATA)
    machine = Machine(endpoints={"huggingface": server.url("")})
    path = "/datasets/owner/name/resolve/main/b"
    server.redirects[path] = (server.url("/cdn/b", host="localhost"), {"X-Linked-Etag": f'"{SHA256}"'})
    archive = build_archive(store, machine, ArchiveSpec(url="hf://datasets/owner/name/b"))
    assert archive.manifest.identity["inputs"] == {"source": f"sha256:{SHA256}"}
    server.redirects[path] = (server.url("/cdn/b"), {"X-Linked-Etag": f'"{"0" * 64}"'})
    with pytest.raises(SourceError, match="differs from the expected 000000000000"):
        build_archive(store, machine, ArchiveSpec(url="hf://datasets/owner/name/b"))


@pytest.mark.parametrize("etag", ['"66fb1c80-fa000"', None])
def test_two_files_of_one_size_and_date_are_two_archives(store: ArtifactStore, server: Loopback, etag: str | None) -> None:
    for path, data in (("/a", DATA), ("/b", OTHER)):
        publish(server, Published(data, etag=etag, last_modified="Tue, 01 Oct 2024 00:00:00 GMT"), path)
    assert [bytes_of(get(store, server.url(path))) for path in ("/a", "/b")] == [DATA, OTHER]
