"""A corpus from its archive to examples on a shared store: what a local run makes, found by every other machine."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.verify import verify
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, SharedStore
from tasks.store.layout import file_name
from tests.corpus.http_server import Loopback, serving
from tests.e2e.world import World
from tests.faults.corpus import Sources, build_all
from tests.store.s3 import BUCKET, CREDENTIALS, Asked, Fate, Proxy, let_pass, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

URL = f"s3://{BUCKET}/corpus"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address, Proxy(address).running() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources.write(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def built(server: Proxy, sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    os.environ.update(CREDENTIALS)
    store = SharedStore(URL, tmp_path_factory.mktemp("here"), endpoint=server.address)
    # A number of workers that no other test takes: a pool that stands has the environment of its start, without credentials.
    return build_all(store, Machine(num_workers=3, pool="processes"), sources)


def contents(artifacts: dict[str, Artifact]) -> dict[str, tuple[str, str]]:
    return {name: (artifact.key, artifact.content) for name, artifact in artifacts.items()}


def test_keys_and_contents_are_those_of_a_local_run(built: dict[str, Artifact], sources: Sources, tmp_path: Path) -> None:
    assert contents(built) == contents(build_all(ArtifactStore(tmp_path), Machine(), sources))


def test_another_machine_finds_all_builds_nothing_and_reads_no_file(
    built: dict[str, Artifact], server: Proxy, sources: Sources, tmp_path: Path
) -> None:
    server.asked.clear()
    found = build_all(SharedStore(URL, tmp_path, endpoint=server.address), Machine(), sources)
    assert contents(found) == contents(built)
    assert all(artifact.found for artifact in found.values())
    assert {asked.method for asked in server.asked} == {"GET"}
    assert all(asked.target.endswith("/manifest.json") for asked in server.asked)


BUILD = """
import sys
from pathlib import Path
from tasks.machine import Machine
from tasks.store import SharedStore
from tests.faults.corpus import Sources, build_all

url, endpoint, cache, corpus, conversations = sys.argv[1:]
build_all(SharedStore(url, Path(cache), endpoint=endpoint, claim_seconds=1), Machine(), Sources(corpus, conversations))
"""


def test_a_machine_that_dies_in_its_build_is_taken_over_shard_for_shard(
    built: dict[str, Artifact], server: Proxy, sources: Sources, tmp_path: Path
) -> None:
    url = f"s3://{BUCKET}/killed"
    reached = threading.Event()

    def watch(asked: Asked) -> Fate:
        if asked.method == "PUT" and "/documents-shard/" in asked.target and len(shards_put(server, "killed")) == 3:
            reached.set()
        return "pass"

    server.rule = watch
    command = [sys.executable, "-c", BUILD, url, server.address, str(tmp_path / "here"), sources.corpus, sources.conversations]
    dead = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert reached.wait(120)
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    server.rule = let_pass
    store = SharedStore(url, tmp_path / "there", endpoint=server.address, claim_seconds=1)
    assert contents(build_all(store, Machine(), sources)) == contents(built)
    put = Counter(shards_put(server, "killed"))
    assert len(put) == len(list(built["documents"].shards()))
    assert sum(put.values()) <= len(put) + 1  # but for the one under way, no shard was built twice


def shards_put(server: Proxy, prefix: str) -> list[str]:
    start, end = f"/{BUCKET}/{prefix}/documents-shard/", "/manifest.json"
    return [
        one.target for one in server.asked if one.method == "PUT" and one.target.startswith(start) and one.target.endswith(end)
    ]


def test_verify_reads_every_byte_and_finds_one_that_changed(built: dict[str, Artifact], server: Proxy, tmp_path: Path) -> None:
    store = SharedStore(URL, tmp_path, endpoint=server.address)
    whole = verify(store, [], Machine(num_workers=2))
    assert (whole.problems, whole.num_artifacts > len(built)) == ((), True)
    entry = next(built["tokens"].shards())
    shard = store.load(entry.kind, entry.key)
    assert shard
    (file,) = shard.manifest.files
    name = file_name(shard.manifest, file)
    data = store.bucket.get(name)
    assert data
    store.bucket.put(name, b"x" + data[1:])
    (problem,) = verify(store, ["tokens"], Machine()).problems
    store.bucket.put(name, data)
    assert problem.ref == shard.ref
    assert f"delete {URL}/{shard.ref}/manifest.json" in problem.remedy


def test_every_command_works_against_a_url(server: Proxy, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/commands"
    with serving() as published:
        here, there = (Shared.make(folder, published) for folder in (tmp_path / "here", tmp_path / "there"))
        for world in (here, there):
            world.variables = {
                **CREDENTIALS,
                "SEQMILL_STORE": url,
                "SEQMILL_STORE_ENDPOINT": server.address,
                "SEQMILL_CACHE": str(world.folder / "cache"),
            }
        built = here.json("run", "small.yaml", "--until", "blocks")
        assert {row["status"] for row in built} == {"built"}
        planned = there.json("plan", "small.yaml", "--until", "blocks")
        assert [(row["key"], row["status"]) for row in planned] == [(row["key"], "found") for row in built]
        listed = {row["key"]: row["content"] for row in there.json("ls")}
        assert listed == {row["key"]: row["content"] for row in built}
        assert there.json("show", "blocks")["content"] == built[-1]["content"]
        assert there.json("verify")["problems"] == []
        again = there.json("run", "small.yaml", "--until", "blocks")
        assert [(row["content"], row["status"]) for row in again] == [(row["content"], "found") for row in built]
        replanned = there.json("plan", "small.yaml", "--until", "blocks", "--set", "blocks.block_size=128")
        assert "block_size 64 -> 128" in replanned[-1]["reason"]


class Shared(World):
    """A machine of its own, whose store is a URL."""

    variables: dict[str, str]

    @classmethod
    def make(cls, folder: Path, server: Loopback) -> "Shared":
        folder.mkdir()
        world = super().make(folder, server)
        return cls(world.folder, world.server)

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, **self.variables}
