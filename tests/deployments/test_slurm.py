"""deployments/nodes.sbatch under a real Slurm, whose nodes are network namespaces of this machine, with the gloo backend."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployments.machines import wait_for
from tests.deployments.slurm import Slurm, is_slurm_here, slurm
from tests.deployments.small import ENDLESS, Clone
from tests.training.netns import can_make_nodes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not can_make_nodes(), reason="network namespaces take root and iproute2"),
    pytest.mark.skipif(not is_slurm_here(), reason="no Slurm: apt-get install --no-install-recommends slurm-wlm munge"),
]

# What a user of this cluster says for the sizes of a large one.
SIZES = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2")
RESUMED = re.compile(r"step (\d+) of \d+")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Slurm]:
    with slurm(tmp_path) as made:
        yield made


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


class Job:
    """A job of deployments/nodes.sbatch, with the recipe put in as its comment says."""

    def __init__(self, cluster: Slurm, clone: Clone, recipe: Path, *options: str, **variables: str) -> None:
        self.cluster, self.clone = cluster, clone
        # What was submitted is Slurm's own copy: the file in the clone is as it was.
        whole = (clone.folder / "deployments/nodes.sbatch").read_text()
        script = clone.edit("nodes.sbatch", {"RECIPE=seq-monkey-small ": f"RECIPE={recipe} "})
        environment = {**clone.environment, **variables}
        self.number = cluster.submit(clone.folder, script, *SIZES, "--time=20", *options, environment=environment)
        (clone.folder / script).write_text(whole)

    @property
    def said(self) -> str:
        """What it has said so far, on one line: the console wraps."""
        path = self.clone.folder / f"seqmill-nodes-{self.number}.log"
        return " ".join(path.read_text().split()) if path.exists() else ""

    def await_word(self, word: str, times: int = 1) -> None:
        wait_for(lambda: self.said.count(word) >= times or self.has_ended(), word)
        assert self.said.count(word) >= times, (word, self.cluster.job(self.number), self.said[-5000:])

    def has_ended(self) -> bool:
        return self.cluster.state(self.number) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def end(self) -> tuple[str, str]:
        """Its state and exit code, when it has ended."""
        told = self.cluster.end(self.number)
        return told["JobState"], told["ExitCode"]

    def resumed_from(self) -> list[int]:
        """The steps from which its trainings went on, oldest first."""
        return [int(found[1]) for part in self.said.split("resumed from")[1:] if (found := RESUMED.search(part))]


def test_a_job_trains_on_all_cores_of_its_nodes_and_leaves_what_one_machine_finds(cluster: Slurm, clone: Clone) -> None:
    recipe = clone.recipe(20)
    job = Job(cluster, clone, recipe)
    assert job.end() == ("COMPLETED", "0:0"), job.said[-5000:]
    assert "joined c1:29400 with up to 2 ranks" in job.said  # one a core: srun has bound the task to all of them
    assert "pretrained: 4 ranks on 2 nodes" in job.said
    assert clone.is_found(recipe)
    assert "Traceback" not in job.said


def test_a_job_whose_time_is_nearly_over_saves_a_checkpoint_and_the_next_goes_on(cluster: Slurm, clone: Clone) -> None:
    recipe = clone.recipe(ENDLESS)
    # Slurm looks every 30 s, and signals up to a minute early.
    job = Job(cluster, clone, recipe, "--time=3", "--signal=TERM@60", SEQMILL_NUM_RANKS="1")
    assert job.end() == ("FAILED", "143:0"), job.said[-5000:]
    (step,) = re.findall(r"pretrained: stopped after step (\d+), whose checkpoint is kept; run again to go on", job.said)
    assert "Traceback" not in job.said

    job = Job(cluster, clone, recipe, SEQMILL_NUM_RANKS="1")
    job.await_word("resumed from")
    wait_for(lambda: len(job.resumed_from()) == 1, "the step")
    assert job.resumed_from() == [int(step)]
    job.await_word(f"of {ENDLESS}, loss")  # it trains
    cluster.tell("scontrol", "requeue", job.number)
    wait_for(lambda: len(job.resumed_from()) == 2, "the queued job's second try")
    first, second = job.resumed_from()  # the first try's lines are there too
    assert second > first
    assert cluster.job(job.number)["Restarts"] == "1"
    cluster.tell("scancel", job.number)
    assert job.end()[0] == "CANCELLED"


def test_a_node_that_is_lost_is_done_without(cluster: Slurm, clone: Clone) -> None:
    recipe = clone.recipe(600)
    job = Job(cluster, clone, recipe, SEQMILL_NUM_RANKS="1")
    job.await_word("step 40 of 600")
    cluster.hosts.kill("c2")
    assert job.end() == ("COMPLETED", "0:0"), job.said[-5000:]
    assert "is gone; the others go on from the newest whole checkpoint" in job.said
    assert (cluster.job(job.number)["Restarts"], len(job.resumed_from())) == ("0", 1)
    assert clone.is_found(recipe)


def test_a_job_that_loses_node_0_is_queued_again_by_the_others_and_goes_on(cluster: Slurm, clone: Clone) -> None:
    recipe = clone.recipe(600)
    # 60 s: the time that the others wait for node 0, here longer than it may take to start, and shorter than ten minutes.
    job = Job(cluster, clone, recipe, SEQMILL_NUM_RANKS="1", SEQMILL_NODE_SECONDS="60")
    job.await_word("step 40 of 600")
    cluster.hosts.kill("c1")
    wait_for(lambda: cluster.job(job.number)["Restarts"] == "1", "that the job is queued again")
    cluster.start_node("c1")  # repaired
    wait_for(lambda: len(job.resumed_from()) == 1, "that it goes on")
    assert job.end() == ("COMPLETED", "0:0"), job.said[-5000:]
    assert clone.is_found(recipe)


def test_a_recipe_that_is_not_there_ends_the_job_at_once(cluster: Slurm, clone: Clone) -> None:
    job = Job(cluster, clone, Path("/nowhere.yaml"))
    assert job.end()[0] == "FAILED"
    assert "/nowhere.yaml: no such recipe" in job.said
