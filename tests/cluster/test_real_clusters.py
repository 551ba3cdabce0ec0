"""A real Dask and a real Ray cluster here: digests of one machine, and nodes that die, stand still or come late."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from tasks.cluster.cluster import Cluster, Patience
from tasks.corpus import many_readers
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, SharedStore
from tests.faults.corpus import Sources, build_all

from . import work
from .engines import Cluster as Started
from .engines import Kind, cluster_of, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

NUM_WORKERS = 3


@pytest.fixture(scope="module", params=get_args(Kind))
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    with cluster_of(request.param, tmp_path_factory.mktemp(request.param), NUM_WORKERS) as one:
        yield one
        disconnect(one.kind)


def disconnect(kind: Kind) -> None:
    """Ray's driver is one a process: the next cluster is another."""
    if kind == "ray":
        import ray

        ray.shutdown()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources.write(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def expected(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    return contents(build_all(ArtifactStore(tmp_path_factory.mktemp("one-machine")), Machine(), sources))


def contents(artifacts: dict[str, Artifact]) -> dict[str, tuple[str, str]]:
    return {name: (artifact.key, artifact.content) for name, artifact in artifacts.items()}


def connected(started: Started, num_slots: int = NUM_WORKERS, **patience: Any) -> Cluster:
    one = Cluster(started.kind, started.address, work.cache, patience=Patience(**patience))
    wait_for(lambda: one.engine.num_slots() >= num_slots)
    return one


def in_groups_of(one: Cluster, size: int) -> Cluster:
    """Groups that do not depend on what was measured."""
    one.sizes.size = lambda what, num_left, num_slots: min(size, num_left)  # type: ignore[method-assign]
    return one


def marks(folder: Path, number: int) -> list[work.Mark]:
    folder.mkdir()
    return [work.Mark(folder, i) for i in range(number)]


def times_begun(folder: Path) -> Counter[int]:
    return Counter(int(path.name.split("-")[0]) for path in folder.glob("[0-9]*"))


def quiet(amount: int) -> None: ...


def test_digests_are_those_of_one_machine_by_workers_that_share_a_bucket_alone(
    started: Started, sources: Sources, expected: dict[str, tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SharedStore((tmp_path / "bucket").as_uri(), tmp_path / "here")
    one = connected(started)
    monkeypatch.setattr(many_readers, "RANGE_BYTES", 4_000)
    built = build_all(store, Machine(cluster=one), sources)
    assert contents(built) == expected
    assert one.num_groups >= NUM_WORKERS
    assert len(list((tmp_path / "bucket").glob("range-shard/*"))) >= 2  # the archive too was read by all
    for name in ("tokens.arrow", "blocks.arrow"):  # made, and kept, elsewhere: here are their manifests
        assert not list((tmp_path / "here").rglob(name))
        assert list(started.folder.rglob(name))


def test_digests_are_those_of_one_machine_by_workers_that_share_a_folder(
    started: Started, sources: Sources, expected: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    built = build_all(ArtifactStore(tmp_path / "store"), Machine(cluster=in_groups_of(connected(started), 2)), sources)
    assert contents(built) == expected


def test_a_worker_killed_in_the_middle_costs_its_group_only(started: Started, tmp_path: Path) -> None:
    one = in_groups_of(connected(started), 4)
    assert one.run(work.die_once, marks(tmp_path / "marks", 20), "marks", quiet) == list(range(20))
    begun = times_begun(tmp_path / "marks")
    assert {number for number, times in begun.items() if times > 1} == {0, 1, 2, 3}
    assert sum(begun.values()) == 24


def test_a_worker_that_stands_still_does_not_hold_up_the_run(started: Started, tmp_path: Path) -> None:
    one = in_groups_of(connected(started, late_seconds=1.0, first_late_seconds=1.0), 4)
    assert one.run(work.stand_still_once, marks(tmp_path / "marks", 20), "marks", quiet) == list(range(20))
    begun = times_begun(tmp_path / "marks")
    assert not (tmp_path / "marks" / work.GO_ON).exists()
    (tmp_path / "marks" / work.GO_ON).touch()
    assert one.num_late >= 1
    assert begun[3] == 2


def test_a_node_that_comes_late_is_used_and_one_that_is_lost_is_done_without(started: Started, tmp_path: Path) -> None:
    one = in_groups_of(connected(started), 2)
    results: list[int] = []
    items = marks(tmp_path / "marks", 2_000)
    run = threading.Thread(target=lambda: results.extend(one.run(work.take_a_while, items, "marks", quiet)))
    run.start()
    wait_for(lambda: len(begun_by(tmp_path / "marks")) >= 2)
    before = begun_by(tmp_path / "marks")
    started.start_worker("node-late")
    wait_for(lambda: len(begun_by(tmp_path / "marks") - before) > NUM_WORKERS - len(before))
    started.kill_node("node-late")
    (tmp_path / "marks" / work.GO_ON).touch()
    run.join()
    assert results == list(range(2_000))


def begun_by(folder: Path) -> set[str]:
    return {path.name.split("-")[1] for path in folder.iterdir()}
