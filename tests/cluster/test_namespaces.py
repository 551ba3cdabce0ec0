"""Clusters whose nodes are network namespaces: addresses and scratch folders of their own, and the store between them."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import orjson
import pytest

from tasks.machine import Machine
from tasks.store import ArtifactStore
from tests.faults.corpus import Sources, build_all
from tests.training.netns import Nodes, can_make_nodes, nodes

from . import work
from .engines import Cluster, Kind, wait_for
from .one_run import NUM_MARKS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.skipif(not can_make_nodes(), reason="needs root and network namespaces"),
]


@pytest.fixture
def network() -> Iterator[Nodes]:
    """The run and the engine's head on node 0, a worker each on nodes 1 and 2."""
    with nodes(3) as made:
        yield made


def within(network: Nodes, node: int) -> tuple[str, ...]:
    return "ip", "netns", "exec", network.names[node]


def start(network: Nodes, kind: Kind, folder: Path) -> Cluster:
    one = Cluster(kind, folder)
    one.start_head(network.address(0), within(network, 0))
    for node in (1, 2):
        one.start_worker(f"node-{node}", network.address(node), within(network, node))
    return one


@pytest.mark.parametrize("kind", get_args(Kind))
def test_digests_are_those_of_one_machine(network: Nodes, kind: Kind, tmp_path: Path) -> None:
    sources = Sources.write(tmp_path / "sources")
    expected = build_all(ArtifactStore(tmp_path / "one-machine"), Machine(), sources)
    one = start(network, kind, tmp_path)
    try:
        one.run("corpus", within(network, 0))
    finally:
        one.end()
    told = orjson.loads((tmp_path / "corpus.json").read_bytes())
    assert told == {name: [artifact.key, artifact.content] for name, artifact in expected.items()}
    assert len(list((tmp_path / "bucket").glob("range-shard/*"))) >= 2
    caches = {path.relative_to(tmp_path).parts[0] for path in tmp_path.glob("node-*/cache/*/*-shard/*")}
    assert caches == {"node-1", "node-2"}  # both worked, each in a folder of its own


def test_a_node_whose_cable_is_pulled_is_done_without(network: Nodes, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    one = start(network, "dask", tmp_path)
    try:
        running = one.begin("marks", within(network, 0))
        wait_for(lambda: len({path.name.split("-")[1] for path in (tmp_path / "marks").iterdir()}) == 2)
        network.unplug(2)
        assert running.wait(300) == 0
    finally:
        one.end()
    assert orjson.loads((tmp_path / "marks.json").read_bytes()) == {"done": list(range(NUM_MARKS))}
    assert not (tmp_path / "marks" / work.GO_ON).exists()
