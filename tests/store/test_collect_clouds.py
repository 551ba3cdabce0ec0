"""The collector on real object stores: beside builders on other machines, and killed wherever it is."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest

from tasks.store import Artifact, SharedStore
from tasks.store.bucket import Bucket
from tasks.store.collect import collect_bucket
from tasks.store.pins import pin, recorded_run
from tasks.store.uses import end_uses
from tests.store.clouds import AZURITE, Cloud, cloud
from tests.store.s3 import Asked, Fate, let_pass
from tests.store.shared_build import BUILDS, QUICK, spell

pytestmark = pytest.mark.slow

# The hours that something lies, in seconds.
LEAST, SURE, LEFT = 6.0, 3.0, 12.0
SECONDS = 40.0


@pytest.fixture(
    scope="module",
    params=["s3", "gs", pytest.param("az", marks=pytest.mark.skipif(not AZURITE, reason="npm install --global azurite"))],
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
    return running


@pytest.fixture
def url(here: Cloud, request: pytest.FixtureRequest) -> str:
    return here.url(request.node.name.split("[")[0])


@pytest.fixture
def open_store(here: Cloud, url: str, tmp_path: Path) -> Callable[[str], SharedStore]:
    return lambda name: SharedStore(url, tmp_path / name, endpoint=here.endpoint, claim_seconds=1, patience=QUICK)


def kept(store: SharedStore, word: str) -> Artifact:
    with recorded_run(store.notes, "mine", ["letters"], None) as record:
        letters = spell(store, word)
        record("letters", letters.ref)
    return letters


def process(*arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.store.collector", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()})


def told(process: "subprocess.Popen[bytes]") -> dict[str, object]:
    out, _ = process.communicate(timeout=SECONDS + 60)
    assert process.returncode == 0
    answer: dict[str, object] = orjson.loads(out)
    return answer


def check(store: SharedStore) -> int:
    """Every manifest in its place has its files and its shards; returns how many there are."""
    found = store.load_all(store.refs())
    for artifact in found:
        assert artifact
        assert store.damage(artifact, digests=True) is None
    return len(found)


def test_what_nothing_needs_goes_and_what_is_asked_for_again_comes_back(
    open_store: Callable[[str], SharedStore], here: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_uses()
    monkeypatch.setattr("tasks.store.uses.FIRST_SECONDS", 3600.0)  # this process itself holds the collector off by nothing
    old, new = spell(open_store("here"), "abc", 9), kept(open_store("here"), "xyz")
    pinned = spell(open_store("here"), "ab")
    pin(open_store("there").notes, pinned)

    def collect() -> tuple[int, int]:
        collected = collect_bucket(open_store("collector"), keep_last=1, grace_seconds=0, least_seconds=1, left_seconds=60)
        return sum(one.number for one in collected.taken), collected.deleted_bytes

    time.sleep(2.5)
    assert collect() == (5, 0)
    BUILDS.clear()
    assert (spell(open_store("there"), "abc", 9).content, BUILDS) == (old.content, [])
    time.sleep(2.5)
    assert collect() == (5, 0)
    time.sleep(2.5)
    assert collect() == (0, 3 + 9 + 3)
    assert check(open_store("checker")) == 5 + 4
    assert all(open_store("checker").find(one.kind, one.key) for one in (new, pinned))
    assert spell(open_store("there"), "abc", 9).content == old.content
    assert here.proxy.asked


def test_beside_builders_on_other_machines_nothing_is_missing(
    open_store: Callable[[str], SharedStore], here: Cloud, url: str, tmp_path: Path
) -> None:
    kept(open_store("here"), "keep")
    builders = [process("build", url, here.endpoint, tmp_path / f"{seed}", seed, SURE, SECONDS) for seed in (1, 2, 3)]
    collector = process("collect", url, here.endpoint, tmp_path / "collector", LEAST, LEFT, SECONDS)
    built = [told(builder) for builder in builders]
    collected = told(collector)
    assert [one["missing"] for one in built] == [[], [], []]
    assert all(collected[name] for name in ("number", "taken", "deleted")), collected
    assert check(open_store("checker"))
    assert open_store("checker").resolve("letters")


def test_killed_at_any_request_it_leaves_a_store_that_verifies_and_the_next_goes_on(
    open_store: Callable[[str], SharedStore], here: Cloud, url: str, tmp_path: Path
) -> None:
    draw = random.Random(int(os.environ.get("SEQMILL_SEED", "7")))
    letters = kept(open_store("here"), "xyz")
    num_kills = 0
    for round_ in range(int(os.environ.get("SEQMILL_KILLS", "8"))):
        whole = spell(open_store("here"), draw.choice(["ab", "bc", "ca"]))
        time.sleep(1.2)
        left = [draw.randrange(90)]
        victim = process("collect", url, here.endpoint, tmp_path / "collector", 1, 60, 0)

        def kill_in_time(asked: Asked, left: list[int] = left, victim: "subprocess.Popen[bytes]" = victim) -> Fate:
            left[0] -= 1
            if left[0] != 0:
                return "pass"
            victim.send_signal(signal.SIGKILL)
            return draw.choice(["pass", "cut"])  # carried out, or not

        here.proxy.rule = kill_in_time
        victim.wait(60)
        num_kills += victim.returncode == -signal.SIGKILL
        here.proxy.rule = let_pass
        check(open_store(f"checker{round_}"))
        assert open_store("checker").find(letters.kind, letters.key)
        again = spell(open_store(f"reader{round_}"), "".join(shard_letters(open_store("here"), whole)))
        assert again.content == whole.content
    assert num_kills
    end_uses()
    for _ in range(3):
        time.sleep(1.5)
        assert told(process("collect", url, here.endpoint, tmp_path / "collector", 1, 1, 0))["number"] == 1
    bucket = Bucket(url, here.endpoint, QUICK)
    assert check(open_store("last")) == 5
    assert list(bucket.objects(".trash")) == []
    assert {one.name.split("/")[1] for kind in ("word", "letters", "letters-shard") for one in bucket.objects(kind)} == {
        key for _, key in open_store("last").refs()
    }


def shard_letters(store: SharedStore, letters: Artifact) -> list[str]:
    return [store.load(entry.kind, entry.key).spec["word"] for entry in letters.shards()]  # type: ignore[union-attr]
