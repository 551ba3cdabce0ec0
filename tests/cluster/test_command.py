"""`seqmill run` with a cluster named in the settings, as a user types it."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.corpus.http_server import serving
from tests.e2e.world import World

from .engines import cluster_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@dataclass
class OnCluster(World):
    """A world whose settings name a cluster."""

    address: str = ""

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "SEQMILL_RUNNER": "dask", "SEQMILL_RUNNER_ADDRESS": self.address}


def test_a_run_on_a_cluster_makes_what_a_run_here_makes_and_each_finds_the_other_s(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    with serving() as published, cluster_of("dask", tmp_path / "cluster", 2) as cluster:
        here, made = World.make(tmp_path / "here", published), World.make(tmp_path / "there", published)
        there = OnCluster(made.folder, made.server, address=cluster.address)
        built = there.json("run", "small.yaml", "--until", "blocks")
        expected = here.json("run", "small.yaml", "--until", "blocks")
        again = there.json("run", "small.yaml", "--until", "blocks")
    assert {row["status"] for row in built} == {"built"}
    assert [(row["key"], row["content"]) for row in built] == [(row["key"], row["content"]) for row in expected]
    assert {row["status"] for row in again} == {"found"}
