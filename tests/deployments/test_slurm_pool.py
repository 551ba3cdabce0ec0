"""deployments/slurm.sbatch and slurm.yaml under a real Slurm: a Prefect worker in an allocation, and what its end leaves."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deployments.machines import wait_for
from tests.deployments.slurm import LOGIN, Slurm, is_slurm_here, slurm
from tests.deployments.small import ENDLESS, Clone
from tests.training.netns import can_make_nodes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can_make_nodes(), reason="network namespaces take root and iproute2"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="no curl: apt-get install curl"),
    pytest.mark.skipif(not is_slurm_here(), reason="no Slurm: apt-get install --no-install-recommends slurm-wlm munge"),
]

SERVER = f"http://{LOGIN}:4200/api"


class Pool:
    """The login node with Prefect's server, on which everything is done as the files of deployments/ say."""

    def __init__(self, cluster: Slurm, clone: Clone, folder: Path) -> None:
        self.cluster, self.clone = cluster, clone
        home = {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        self.environment = {**clone.environment, **home, "SEQMILL_NUM_RANKS": "2"}
        self.script = clone.edit("slurm.sbatch", {"http://SERVER:4200/api": SERVER})
        server = [str(clone.folder / ".venv/bin/prefect"), "server", "start", "--host", LOGIN, "--port", "4200"]
        cluster.hosts.start(LOGIN, server, folder / "server.log", {**cluster.environment, **self.environment})
        wait_for(lambda: cluster.can("curl", "--silent", "--fail", f"{SERVER}/health"), "the server", 120)
        self.prefect("work-pool", "create", "seqmill-slurm", "--type", "process")
        self.prefect("--no-prompt", "deploy", "--all", "--prefect-file", "deployments/slurm.yaml")

    def prefect(self, *arguments: str) -> str:
        command = ("env", f"--chdir={self.clone.folder}", ".venv/bin/prefect", *arguments)
        return self.cluster.tell(*command, **self.environment, PREFECT_API_URL=SERVER)

    def submit(self) -> str:
        options = ("--gpus-per-node=2", "--cpus-per-task=2", "--time=20")
        return self.cluster.submit(self.clone.folder, self.script, *options, environment=self.environment)

    def run(self) -> dict[str, Any]:
        """The one run there is."""
        asked = ("--header", "content-type: application/json", "--data", "{}", f"{SERVER}/flow_runs/filter")
        (found,) = json.loads(self.cluster.tell("curl", "--silent", "--fail", *asked))
        return dict(found)

    def log(self, job: str) -> str:
        return (self.clone.folder / f"seqmill-{job}.log").read_text()

    def await_word(self, job: str, word: str) -> None:
        path = self.clone.folder / f"seqmill-{job}.log"
        wait_for(lambda: path.exists() and word in path.read_text(), word)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with slurm(tmp_path, num_nodes=1) as cluster:
        yield Pool(cluster, Clone(tmp_path), tmp_path)


def test_a_run_whose_allocation_ends_saves_a_checkpoint_and_the_next_worker_goes_on_with_it(pool: Pool) -> None:
    recipe = pool.clone.recipe(ENDLESS)
    job = pool.submit()
    pool.prefect("deployment", "run", "pretrain-flow/pretrain-flow-slurm", "--param", f"recipe={recipe}")
    pool.await_word(job, f"step 40 of {ENDLESS}")
    pool.cluster.tell("scancel", "--batch", "--signal=TERM", job)  # as --signal=B:TERM@120 does
    assert pool.cluster.end(job)["JobState"] == "COMPLETED"
    assert "whose checkpoint is kept" in pool.log(job)
    assert pool.run()["state"]["type"] == "SCHEDULED"  # of itself

    job = pool.submit()
    pool.await_word(job, "resumed from")
    assert pool.run()["state"]["name"] == "Running"
    pool.cluster.tell("scancel", job)
    assert pool.cluster.end(job)["JobState"] == "CANCELLED"
    assert pool.run()["state"]["type"] == "SCHEDULED"
