"""A shared store on a real S3 server, with the faults of a network and of a bucket that answers late."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from tasks.errors import StoreError
from tasks.machine import Machine
from tasks.store import ArtifactStore, SharedStore
from tasks.store.bucket import PART_BYTES, Bucket
from tests.store.s3 import BUCKET, CREDENTIALS, EMPTY_LIST, Asked, Fate, Proxy, s3_server, status
from tests.store.shared_build import BUILDS, QUICK, WordSpec, build_word, spell

LARGE = PART_BYTES + 1  # two parts


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    BUILDS.clear()
    with Proxy(server).running() as proxy:
        yield proxy


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}"


@pytest.fixture
def open_store(proxy: Proxy, url: str, tmp_path: Path) -> Callable[[str], SharedStore]:
    return lambda name: SharedStore(url, tmp_path / name, endpoint=proxy.address, claim_seconds=1, patience=QUICK)


def first_try_of_each(fate: Fate, does_fail: Callable[[Asked], bool]) -> Callable[[Asked], Fate]:
    """The first time that something is asked for it fails, and the second time it does not."""
    seen: Counter[tuple[str, str]] = Counter()

    def rule(asked: Asked) -> Fate:
        seen[asked.method, asked.target.partition("uploadId")[0]] += 1
        return fate if seen[asked.method, asked.target.partition("uploadId")[0]] == 1 and does_fail(asked) else "pass"

    return rule


def test_another_machine_finds_everything_and_one_find_is_one_request(
    open_store: Callable[[str], SharedStore], proxy: Proxy, tmp_path: Path
) -> None:
    whole = spell(open_store("here"), "ab", LARGE)
    assert whole.content == spell(ArtifactStore(tmp_path / "local"), "ab", LARGE).content
    BUILDS.clear()
    proxy.asked.clear()
    found = spell(open_store("there"), "ab", LARGE)
    assert (found.found, found.content, BUILDS) == (True, whole.content, [])
    assert [asked.method for asked in proxy.asked] == ["GET", "GET"]
    word = open_store("there").resolve("word")
    assert word.file("large/bytes").read_bytes() == open_store("here").resolve("word").file("large/bytes").read_bytes()


@pytest.mark.parametrize(
    "fate",
    [
        pytest.param(status(500), id="500"),
        pytest.param(status(503), id="503", marks=pytest.mark.slow),
        pytest.param("cut", marks=pytest.mark.slow),
        pytest.param("cut-answer", marks=pytest.mark.slow),
    ],
)
def test_what_passes_is_tried_again(open_store: Callable[[str], SharedStore], proxy: Proxy, fate: Fate) -> None:
    """Every request fails once: parts, ranges, manifests, claims; a PUT may have been done when its answer is cut."""
    proxy.rule = first_try_of_each(fate, lambda asked: True)
    spell(open_store("here"), "a", LARGE)
    found = spell(open_store("there"), "a", LARGE)
    word = open_store("there").resolve("word")
    assert (found.found, BUILDS) == (True, ["a", "letters", "a"])
    assert open_store("there").damage(word, digests=True) is None
    assert word.file("large/bytes").stat().st_size == LARGE


@pytest.mark.slow
def test_a_read_that_stalls_is_given_up_and_made_again(open_store: Callable[[str], SharedStore], proxy: Proxy) -> None:
    spell(open_store("here"), "a", LARGE)
    there = open_store("there")
    there.bucket.patience = replace(QUICK, read_seconds=0.5)
    proxy.rule = first_try_of_each("stall", lambda asked: "/manifest.json" not in asked.target)
    assert there.resolve("word").file("large/bytes").stat().st_size == LARGE


def test_what_does_not_pass_is_an_error_of_one_line_that_names_no_credential(
    open_store: Callable[[str], SharedStore], proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = status(403, b"<Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>reader</AWSAccessKeyId></Error>")
    proxy.rule = lambda asked: refused
    with caplog.at_level(logging.DEBUG, "tasks"), pytest.raises(StoreError) as caught:
        open_store("here").load("word", "0" * 64)  # type: ignore[arg-type]
    told = f"{caught.value} {caplog.text}"
    assert "the credentials and their rights" in told
    assert not any(secret in told for secret in ("\n", "reader", CREDENTIALS["AWS_SECRET_ACCESS_KEY"]))


def test_a_bucket_that_is_not_there_is_an_error_that_names_it(proxy: Proxy, tmp_path: Path) -> None:
    proxy.rule = lambda asked: status(404, b"<Error><Code>NoSuchBucket</Code></Error>")
    store = SharedStore("s3://no-such-bucket/x", tmp_path, endpoint=proxy.address, patience=QUICK)
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/x/.*; check its name"):
        build_word(store, Machine(), WordSpec(word="a"))


def test_no_credential_is_in_an_object_s_bytes(open_store: Callable[[str], SharedStore], url: str, proxy: Proxy) -> None:
    artifact = build_word(open_store("here"), Machine(), WordSpec(word="a"))
    data = Bucket(url, proxy.address).get(f"{artifact.ref}/manifest.json")
    assert data
    assert not any(value.encode() in data for value in CREDENTIALS.values() if value != "us-east-1")


def test_a_listing_that_lags_loses_and_rebuilds_nothing(open_store: Callable[[str], SharedStore], proxy: Proxy) -> None:
    proxy.rule = lambda asked: EMPTY_LIST if asked.is_list else "pass"
    spell(open_store("here"), "ab")
    BUILDS.clear()
    found = spell(open_store("there"), "ab")
    assert (found.found, BUILDS) == (True, [])
    assert open_store("third").resolve(found.ref).content == found.content
    spell(open_store("there"), "abc")
    assert BUILDS == ["abc", "letters", "a", "b", "c"]  # another word: its letters are others'


def test_a_bar_is_told_every_byte_once_whatever_was_tried_again(url: str, proxy: Proxy, tmp_path: Path) -> None:
    told: list[int] = []
    bucket = Bucket(url, proxy.address, QUICK)
    (tmp_path / "sent").write_bytes(b"a" * LARGE)
    proxy.rule = first_try_of_each("cut", lambda asked: True)
    bucket.upload(tmp_path / "sent", "object", told.append)
    assert sum(told) == LARGE
    told.clear()
    bucket.download("object", tmp_path / "read", LARGE, told.append)
    assert (sum(told), min(told)) == (LARGE, 1)


def test_a_download_that_was_cut_short_goes_on_where_it_was(open_store: Callable[[str], SharedStore], proxy: Proxy) -> None:
    build_word(open_store("here"), Machine(), WordSpec(word="a", num_bytes=LARGE))
    word = open_store("there").resolve("word")
    proxy.asked.clear()
    proxy.rule = lambda asked: status(403) if "/bytes" in asked.target and len(ranges(proxy)) > 1 else "pass"
    with pytest.raises(StoreError, match="the credentials and their rights"):
        word.file("large/bytes")
    failed = len(ranges(proxy))
    proxy.asked.clear()
    proxy.rule = lambda asked: "pass"
    assert word.file("large/bytes").stat().st_size == LARGE
    assert (failed, len(ranges(proxy))) == (2, 1)


def ranges(proxy: Proxy) -> list[Asked]:
    return [asked for asked in proxy.asked if asked.target.endswith("/bytes") and asked.method == "GET"]


def machine(url: str, endpoint: str, cache: Path, num_bytes: int, claim_seconds: float) -> "subprocess.Popen[bytes]":
    """Another machine that builds the letters of "ab"."""
    command = [sys.executable, "-m", "tests.store.shared_build", url, endpoint, str(cache), "ab", str(num_bytes)]
    return subprocess.Popen([*command, str(claim_seconds)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()})


def told(process: "subprocess.Popen[bytes]") -> dict[str, object]:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    answer: dict[str, object] = orjson.loads(out)
    return answer


def test_of_two_machines_at_once_each_artifact_is_built_by_one(url: str, proxy: Proxy, tmp_path: Path) -> None:
    machines = [machine(url, proxy.address, tmp_path / name, 0, 30) for name in ("here", "there")]
    first, second = (told(process) for process in machines)
    assert first["content"] == second["content"]
    assert sorted([*first["builds"], *second["builds"]]) == ["a", "ab", "b", "letters"]  # type: ignore[misc]
    claims = [asked for asked in proxy.asked if asked.method == "PUT" and "/.claims/" in asked.target]
    assert len(claims) >= 4


@pytest.mark.parametrize("who", ["another machine", pytest.param("the same machine", marks=pytest.mark.slow)])
def test_a_builder_killed_in_its_upload_is_taken_over(url: str, proxy: Proxy, tmp_path: Path, who: str) -> None:
    """Another machine waits for what the dead one promised and builds; the same machine goes on with what it had built."""
    reached = threading.Event()

    def hold_the_second_part(asked: Asked) -> Fate:
        if asked.part == 2:
            reached.set()
            return "hold"
        return "pass"

    proxy.rule = hold_the_second_part
    dead = machine(url, proxy.address, tmp_path / "here", LARGE, 1)
    assert reached.wait(60)
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    proxy.rule = lambda asked: "pass"
    is_same = who == "the same machine"
    cache = tmp_path / ("here" if is_same else "there")
    store = SharedStore(url, cache, endpoint=proxy.address, claim_seconds=1, patience=QUICK)
    whole = spell(store, "ab", LARGE)
    assert [*([] if is_same else ["ab"]), "letters", "a", "b"] == BUILDS
    assert whole.content == spell(ArtifactStore(tmp_path / "local"), "ab", LARGE).content
    word = SharedStore(url, tmp_path / "third", endpoint=proxy.address, patience=QUICK).resolve("word")
    assert SharedStore(url, tmp_path / "third", endpoint=proxy.address, patience=QUICK).damage(word, digests=True) is None
