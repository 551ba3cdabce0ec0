"""What a shared store asks of an object store, asked of each sort: s3://, gs:// and az://, on loopback."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.errors import StoreError
from tasks.machine import Machine
from tasks.store import SharedStore
from tasks.store.bucket import MOST_PARTS, PART_BYTES, Bucket
from tests.store.clouds import AZURITE, Cloud, cloud
from tests.store.s3 import Asked, Fate, let_pass, status
from tests.store.shared_build import BUILDS, QUICK, WordSpec, build_word, spell
from tests.store.test_shared_s3 import first_try_of_each, machine, told

LARGE = 2 * PART_BYTES + 1  # three parts
NAMES = ("word/0a/manifest.json", "word/0a/f/large/bytes", "word/0b/f/é 中 + 100%", "other/x")


# s3:// has its own file of tests, which every run makes.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param("s3", marks=pytest.mark.slow),
        "gs",
        pytest.param("az", marks=[pytest.mark.slow, pytest.mark.skipif(not AZURITE, reason="npm install --global azurite")]),
    ],
)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with cloud(request.param, tmp_path_factory.mktemp(request.param)) as running:
        yield running


@pytest.fixture
def here(running: Cloud, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    BUILDS.clear()
    running.proxy.rule = let_pass
    running.proxy.asked.clear()
    return running


@pytest.fixture
def url(here: Cloud, request: pytest.FixtureRequest) -> str:
    return here.url(request.node.name.split("[")[0])


@pytest.fixture
def bucket(here: Cloud, url: str) -> Bucket:
    return Bucket(url, here.endpoint, QUICK)


@pytest.fixture
def open_store(here: Cloud, url: str, tmp_path: Path) -> Callable[[str], SharedStore]:
    return lambda name: SharedStore(url, tmp_path / name, endpoint=here.endpoint, claim_seconds=1, patience=QUICK)


def test_an_object_is_written_read_measured_and_removed(bucket: Bucket) -> None:
    for name in NAMES:
        bucket.put(name, name.encode())
        bucket.put(name, 2 * name.encode())
    assert [bucket.get(name) for name in NAMES] == [2 * name.encode() for name in NAMES]
    assert bucket.num_bytes(NAMES[0]) == 2 * len(NAMES[0])
    bucket.delete(NAMES[3])
    bucket.delete(NAMES[3])
    assert (bucket.get(NAMES[3]), bucket.num_bytes(NAMES[3])) == (None, None)


def test_a_listing_names_what_is_just_below(bucket: Bucket) -> None:
    for name in NAMES:
        bucket.put(name, b"")
    assert (sorted(bucket.names()), sorted(bucket.names("word")), bucket.names("none")) == (["other", "word"], ["0a", "0b"], [])


@pytest.mark.parametrize("number", [10, pytest.param(1100, marks=pytest.mark.slow)])
def test_every_object_is_listed_with_its_time_and_many_are_removed_at_once(bucket: Bucket, number: int) -> None:
    names = [f"many{number}/{i:04}/x y" for i in range(number)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: bucket.put(name, name.encode()), names))
    listed = list(bucket.objects(f"many{number}"))
    assert [(one.name, one.num_bytes) for one in listed] == [(name, len(name)) for name in names]
    assert bucket.dated(names[0]) == (names[0].encode(), pytest.approx(listed[0].modified, abs=1.01))
    assert bucket.modified(names[0]) == pytest.approx(listed[0].modified, abs=1.01)
    bucket.delete(names[3])
    bucket.delete_all(names)
    assert list(bucket.objects(f"many{number}")) == []
    assert (bucket.dated(names[0]), bucket.modified(names[0])) == (None, None)
    bucket.delete_all(names[:2])
    bucket.delete_all([])


@pytest.mark.parametrize("num_bytes", [3, pytest.param(6 << 20, marks=pytest.mark.slow)])
def test_of_many_who_create_one_object_one_does(bucket: Bucket, num_bytes: int) -> None:
    name = f"new{num_bytes}"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: bucket.put_new(name, bytes([i]) * num_bytes), range(8)))
    assert sum(made) == 1
    assert bucket.get(name) == bytes([made.index(True)]) * num_bytes
    bucket.delete(name)
    assert bucket.put_new(name, b"again")


def test_a_range_ends_where_the_object_does(bucket: Bucket) -> None:
    bucket.put("ten", b"0123456789")
    read = [bucket.read("ten", start, length) for start, length in [(0, 10), (3, 4), (8, 5), (20, 5)]]
    assert [None if data is None else bytes(data) for data in read] == [b"0123456789", b"3456", b"89", None]
    assert bucket.read("none", 0, 1) is None


def test_a_large_file_goes_up_in_parts_and_comes_down_in_ranges(here: Cloud, bucket: Bucket, tmp_path: Path) -> None:
    source, target, advanced = tmp_path / "source", tmp_path / "target", []
    source.write_bytes(bytes(range(256)) * (LARGE // 256) + b"x")
    bucket.upload(source, "large", advanced.append)
    assert (bucket.num_bytes("large"), sum(advanced)) == (LARGE, LARGE)
    writes = [asked for asked in here.proxy.asked if asked.method in ("PUT", "POST")]
    assert len(writes) == (4 if here.scheme == "az" else 5)  # three parts, one more to end, and one to begin where ids are given
    here.proxy.asked.clear()
    assert bucket.download("large", target, LARGE, lambda amount: None)
    assert target.read_bytes() == source.read_bytes()
    assert len(here.proxy.asked) == 3
    assert -(-LARGE // PART_BYTES) <= MOST_PARTS


def test_an_upload_that_is_cut_off_leaves_no_object(here: Cloud, bucket: Bucket, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(LARGE))
    is_part = lambda asked: asked.method == "PUT" and ("partNumber=3" in asked.target or "comp=block&" in f"{asked.target}&")  # noqa: E731
    here.proxy.rule = lambda asked: status(500) if is_part(asked) else "pass"
    with pytest.raises(StoreError, match="run again to go on"):
        bucket.upload(source, "torn", lambda amount: None)
    here.proxy.rule = let_pass
    assert (bucket.get("torn"), bucket.names()) == (None, [])


@pytest.mark.parametrize(
    "fate", [pytest.param(status(503), id="503"), *(pytest.param(fate, marks=pytest.mark.slow) for fate in ("cut", "cut-answer"))]
)
def test_what_passes_is_tried_again(open_store: Callable[[str], SharedStore], here: Cloud, fate: Fate) -> None:
    """Every request fails once; one whose answer was cut was carried out."""
    here.proxy.rule = first_try_of_each(fate, lambda asked: True)
    spell(open_store("here"), fate[:3].hex() if isinstance(fate, bytes) else fate)
    whole = spell(open_store("there"), "a", PART_BYTES + 1)
    found = open_store("third").resolve(whole.ref)
    assert open_store("third").damage(found, digests=True) is None


def test_another_machine_finds_all_and_a_find_is_one_request(open_store: Callable[[str], SharedStore], here: Cloud) -> None:
    whole = spell(open_store("here"), "ab", 9)
    BUILDS.clear()
    here.proxy.asked.clear()
    found = spell(open_store("there"), "ab", 9)
    assert (found.found, found.content, BUILDS) == (True, whole.content, [])
    assert [asked.method for asked in here.proxy.asked] == ["GET", "GET"]
    assert [found.shard_file(entry, "letter").read_text() for entry in found.shards()] == ["a", "b"]


def test_the_manifest_is_put_last_and_only_where_there_is_none(open_store: Callable[[str], SharedStore], here: Cloud) -> None:
    word = build_word(open_store("here"), Machine(), WordSpec(word="abc"))
    written = [asked.name.rpartition("/")[2] for asked in here.proxy.asked if asked.method == "PUT" and word.key in asked.name]
    assert written[-2:] == ["word.txt", "manifest.json"]


@pytest.mark.slow
def test_of_two_machines_at_once_each_artifact_is_built_by_one(here: Cloud, url: str, tmp_path: Path) -> None:
    machines = [machine(url, here.endpoint, tmp_path / name, 0, 30) for name in ("here", "there")]
    first, second = (told(process) for process in machines)
    assert first["content"] == second["content"]
    assert sorted([*first["builds"], *second["builds"]]) == ["a", "ab", "b", "letters"]  # type: ignore[misc]


@pytest.mark.slow
def test_a_builder_killed_in_its_upload_is_taken_over(here: Cloud, url: str, tmp_path: Path) -> None:
    reached = threading.Event()

    def hold_the_manifest(asked: Asked) -> Fate:
        if asked.method == "PUT" and asked.name.endswith("manifest.json"):
            reached.set()
            return "hold"
        return "pass"

    here.proxy.rule = hold_the_manifest
    dead = machine(url, here.endpoint, tmp_path / "here", LARGE, 1)
    assert reached.wait(60)
    dead.kill()
    dead.wait()
    here.proxy.rule = let_pass
    store = SharedStore(url, tmp_path / "there", endpoint=here.endpoint, claim_seconds=1, patience=QUICK)
    whole = spell(store, "ab", LARGE)
    assert BUILDS == ["ab", "letters", "a", "b"]
    assert store.damage(whole, digests=True) is None


def test_a_key_that_does_not_open_is_told_in_one_line(
    url: str, here: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in here.environment:
        if name.endswith(("TOKEN", "KEY")):
            monkeypatch.setenv(name, "d3Jvbmc=")  # "wrong", as Azure's keys are spelled
    store = SharedStore(f"{url}-wrong", tmp_path, endpoint=here.endpoint, patience=QUICK)
    with pytest.raises(StoreError, match="the credentials and their rights") as caught:
        store.load("word", "0" * 64)  # type: ignore[arg-type]
    assert not any(secret in str(caught.value) for secret in ("\n", "d3Jvbmc=", *here.environment.values()))
