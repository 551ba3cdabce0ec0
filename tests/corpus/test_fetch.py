"""How published bytes come from a real server: dropped, refused, changed, killed in the middle."""

import hashlib
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tasks.corpus import fetch
from tasks.corpus.archive import ArchiveSpec, build_archive
from tasks.errors import DiskSpaceError, SourceError
from tasks.machine import Machine
from tasks.store import ArtifactStore
from tests.corpus.http_server import Loopback, Published, serving
from tests.corpus.publishing import DATA, MD5, OTHER, SHA256, bytes_of, get, partial, publish


def test_a_file_is_fetched_and_verified(store: ArtifactStore, server: Loopback) -> None:
    archive = get(store, publish(server, Published(DATA)), sha256=SHA256, md5=MD5)
    assert bytes_of(archive) == DATA
    assert archive.stats == {"num_bytes": len(DATA), "sha256": SHA256, "md5": MD5}
    assert server.asked("HEAD") == []  # the recipe says what the bytes are: a run that finds them needs no server


def test_bytes_come_as_published_not_packed_for_the_way(store: ArtifactStore, server: Loopback) -> None:
    get(store, publish(server, Published(DATA)), sha256=SHA256)
    assert server.asked("GET")[0][1]["accept-encoding"] == "identity"


def test_a_redirect_to_another_host_is_followed(store: ArtifactStore, server: Loopback) -> None:
    with serving() as cdn:
        cdn.files["/signed"] = Published(DATA)
        server.redirects["/a"] = (cdn.url("/signed", host="localhost"), {})
        assert bytes_of(get(store, server.url("/a"), md5=MD5)) == DATA


def test_wrong_bytes_are_refused_with_both_digests_and_deleted(store: ArtifactStore, server: Loopback) -> None:
    url = publish(server, Published(OTHER))
    with pytest.raises(SourceError, match=rf"sha256 {hashlib.sha256(OTHER).hexdigest()[:12]} .* expected {SHA256[:12]}"):
        get(store, url, sha256=SHA256)
    assert partial(store) is None
    publish(server, Published(DATA))
    assert bytes_of(get(store, url, sha256=SHA256)) == DATA


@pytest.mark.parametrize(("status", "hint"), [(404, "check the address"), (403, "refused"), (401, "account"), (410, "check")])
def test_a_refusal_is_said_at_once(store: ArtifactStore, server: Loopback, status: int, hint: str) -> None:
    url = publish(server, Published(DATA, faults=[("status", status)] * 9))
    with pytest.raises(SourceError, match=rf"/a: status {status}; .*{hint}"):
        get(store, url, md5=MD5)
    assert len(server.asked("GET")) == 1


def test_a_refusal_behind_a_redirect_names_both_ends(store: ArtifactStore, server: Loopback) -> None:
    server.redirects["/a"] = (server.url("/gone", host="localhost"), {})
    with pytest.raises(SourceError, match=r"/a \(sent on to localhost\): status 404"):
        get(store, server.url("/a"), md5=MD5)


@pytest.mark.parametrize("fault", [("status", 503), ("status", 500), ("status", 429), ("drop", 0), ("drop", 1000)])
def test_a_passing_fault_is_tried_again(store: ArtifactStore, server: Loopback, fault: tuple[str, int]) -> None:
    url = publish(server, Published(DATA, faults=[fault]))
    assert bytes_of(get(store, url, md5=MD5)) == DATA
    assert len(server.asked("GET")) == 2


def test_the_wait_that_a_server_asks_for_is_kept(server: Loopback, tmp_path: Path) -> None:
    url = publish(server, Published(DATA, faults=[("retry-after", "7")]))
    waits: list[float] = []
    fetch.fetch(url, tmp_path, Machine().progress, waits.append)
    assert waits == [7]


def test_a_dropped_connection_goes_on_at_the_next_byte(store: ArtifactStore, server: Loopback) -> None:
    url = publish(server, Published(DATA, faults=[("drop", 300_000), ("drop", 200_000)]))
    assert bytes_of(get(store, url, md5=MD5)) == DATA
    asked = [(headers.get("range"), headers.get("if-range")) for _, headers in server.asked("GET")]
    assert asked == [(None, None), ("bytes=300000-", f'"{MD5}"'), ("bytes=500000-", f'"{MD5}"')]
    assert server.num_bytes_sent == len(DATA)


def test_any_number_of_drops_is_borne_while_bytes_come(store: ArtifactStore, server: Loopback) -> None:
    url = publish(server, Published(DATA, faults=[("drop", 50_000)] * 15))
    assert bytes_of(get(store, url, md5=MD5)) == DATA


def test_when_the_tries_run_out_the_bytes_are_kept_for_the_next_run(store: ArtifactStore, server: Loopback) -> None:
    url = publish(server, Published(DATA, faults=[("drop", 300_000), *[("status", 503)] * 4]))
    with pytest.raises(SourceError, match=r"status 503, 4 tries in a row; 300,000 bytes are kept: run again"):
        get(store, url, md5=MD5)
    assert bytes_of(get(store, url, md5=MD5)) == DATA
    assert server.num_bytes_sent == len(DATA)


def test_a_server_that_is_not_there_is_said(store: ArtifactStore, server: Loopback) -> None:
    with serving() as gone:
        url = gone.url("/a")
    with pytest.raises(SourceError, match="4 tries in a row; 0 bytes are kept"):
        get(store, url, md5=MD5)
    with pytest.raises(SourceError, match="state the file's sha256"):
        get(store, url)


@pytest.mark.parametrize(
    "change",
    [
        lambda: Published(DATA, takes_ranges=False),  # answers 200 to a Range
        lambda: Published(DATA, etag='"other"'),  # If-Range does not hold: 200
        lambda: Published(DATA, etag='W/"weak"'),  # never matches an If-Range
        lambda: Published(DATA, etag=None, last_modified="Tue, 01 Oct 2024 00:00:00 GMT"),
    ],
)
def test_a_file_that_cannot_be_gone_on_with_starts_from_zero(
    store: ArtifactStore, server: Loopback, change: Callable[[], Published]
) -> None:
    url = publish(server, Published(OTHER, faults=[("drop", 300_000), *[("status", 503)] * 4]))
    with pytest.raises(SourceError, match="300,000 bytes are kept"):
        get(store, url, md5=MD5)
    publish(server, change())
    assert bytes_of(get(store, url, md5=MD5)) == DATA
    assert server.num_bytes_sent == 300_000 + len(DATA)


def test_a_continuation_of_another_file_is_not_taken(server: Loopback, tmp_path: Path) -> None:
    # A weak ETag sends no If-Range: the server answers 206, of another file.
    url = publish(server, Published(OTHER, etag='W/"1"', faults=[("drop", 300_000), *[("status", 503)] * 4]))
    with pytest.raises(SourceError):
        fetch.fetch(url, tmp_path, Machine().progress)
    publish(server, Published(DATA, etag='W/"2"'))
    assert fetch.fetch(url, tmp_path, Machine().progress).md5 == MD5


def test_a_range_beyond_the_end_starts_from_zero(server: Loopback, tmp_path: Path) -> None:
    url = publish(server, Published(DATA, etag=None, faults=[("drop", 300_000), *[("status", 503)] * 4]))
    with pytest.raises(SourceError):
        fetch.fetch(url, tmp_path, Machine().progress)
    publish(server, Published(b"short", etag=None))
    assert fetch.fetch(url, tmp_path, Machine().progress).num_bytes == 5


def test_a_file_without_a_length_is_fetched_whole(store: ArtifactStore, server: Loopback) -> None:
    url = publish(server, Published(DATA, gives_length=False))
    assert bytes_of(get(store, url, md5=MD5)) == DATA


def test_a_partial_file_without_its_note_is_not_trusted(server: Loopback, tmp_path: Path) -> None:
    (tmp_path / "partial").write_bytes(OTHER)
    (tmp_path / "partial.json").write_text("{")
    assert fetch.fetch(publish(server, Published(DATA)), tmp_path, Machine().progress).md5 == MD5


def test_more_than_the_free_room_is_refused_before_it_is_fetched(store: ArtifactStore, server: Loopback) -> None:
    url = publish(server, Published(DATA, headers={"Content-Length": str(1 << 60)}))
    with pytest.raises(DiskSpaceError, match=r"bytes free, 1,152,921,504,606,846,976 still to come"):
        get(store, url, md5=MD5)
    assert partial(store) is None


def test_progress_is_told_in_bytes_with_the_total(store: ArtifactStore, server: Loopback) -> None:
    bars: list[tuple[str, int | None, str, list[int]]] = []

    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        amounts: list[int] = []
        bars.append((label, total, unit, amounts))
        yield amounts.append

    url = publish(server, Published(DATA, faults=[("drop", 300_000)]))
    build_archive(store, Machine(progress=progress), ArchiveSpec(url=url, md5=MD5))
    assert [(label, total, unit) for label, total, unit, _ in bars] == [("archive", len(DATA), "B")] * 2
    assert list(itertools.accumulate(sum(amounts) for *_, amounts in bars)) == [300_000, 300_000 + len(DATA)]
    assert bars[1][3][0] == 300_000  # the second bar starts where the first one ended


FETCH_AND_DIE = """
import contextlib, os, signal, sys
from pathlib import Path
from tasks.corpus.archive import ArchiveSpec, build_archive
from tasks.machine import Machine
from tasks.store import ArtifactStore

@contextlib.contextmanager
def progress(label, total, unit):
    had = 0
    def advance(amount):
        nonlocal had
        had += amount
        if had > 300_000:
            os.kill(os.getpid(), signal.SIGKILL)
    yield advance

build_archive(ArtifactStore(Path(sys.argv[1])), Machine(progress=progress), ArchiveSpec(url=sys.argv[2], md5=sys.argv[3]))
"""


def test_killed_in_the_middle_it_goes_on_at_the_next_byte(store: ArtifactStore, server: Loopback) -> None:
    url = publish(server, Published(DATA))
    dead = subprocess.run([sys.executable, "-c", FETCH_AND_DIE, str(store.root), url, MD5], check=False)
    assert dead.returncode == -9
    kept = partial(store)
    assert kept is not None
    num_kept = kept.stat().st_size
    assert 300_000 < num_kept < len(DATA)
    archive = get(store, url, md5=MD5)
    assert bytes_of(archive) == DATA
    assert server.asked("GET")[-1][1]["range"] == f"bytes={num_kept}-"
    assert archive.content == get(ArtifactStore(store.root / "other"), url, md5=MD5).content


def test_a_fetch_killed_after_its_last_byte_asks_for_nothing_more(server: Loopback, tmp_path: Path) -> None:
    url = publish(server, Published(DATA))
    fetch.fetch(url, tmp_path, Machine().progress)
    assert fetch.fetch(url, tmp_path, Machine().progress).md5 == MD5
    assert len(server.asked("GET")) == 1


def test_a_token_opens_its_host_and_is_not_passed_on(store: ArtifactStore, server: Loopback) -> None:
    server.files["/elsewhere"] = Published(DATA)
    server.redirects["/a"] = (server.url("/elsewhere", host="localhost"), {})
    machine = Machine(tokens={"127.0.0.1": "planted", "other": "unused"})
    artifact = build_archive(store, machine, ArchiveSpec(url=server.url("/a")))
    asked = {(path, headers.get("authorization")) for _, path, headers in server.requests}
    assert asked == {("/a", "Bearer planted"), ("/elsewhere", None)}
    assert "planted" not in f"{artifact.manifest.model_dump()} {machine}"


def test_wrong_bytes_are_not_asked_for_again(store: ArtifactStore, server: Loopback) -> None:
    url = publish(server, Published(OTHER))
    with pytest.raises(SourceError, match="differs from the expected"):
        get(store, url, md5=MD5)
    assert len(server.asked("GET")) == 1


def test_a_server_that_falls_silent_is_asked_to_go_on(
    store: ArtifactStore, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT", httpx.Timeout(0.2, connect=20))
    url = publish(server, Published(DATA, faults=[("silence", 1000)]))
    assert bytes_of(get(store, url, md5=MD5)) == DATA
    assert [headers.get("range") for _, headers in server.asked("GET")] == [None, "bytes=1000-"]


def test_who_plans_asks_once_for_a_file_and_not_again_at_a_host_that_is_away() -> None:
    with serving() as server:
        server.files["/a"] = Published(DATA)
        with fetch.asking_once():
            assert fetch.ask(server.url("/a")) == fetch.ask(server.url("/a"))
        assert len(server.requests) == 1
    with fetch.asking_once():
        with pytest.raises(SourceError, match=r"/a: .*refused; run again later"):
            fetch.ask(server.url("/a"))
        with pytest.raises(SourceError, match=f"/b: 127.0.0.1:{server.port} did not answer a moment ago; run again later"):
            fetch.ask(server.url("/b"))
