"""Hosts of a hostfile over a real ssh: deployments/nodes.sh, and the whole hostfile handed to DeepSpeed's own launcher."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployments.machines import Machines, Process, wait_for
from tests.deployments.small import ENDLESS, Clone
from tests.deployments.sshd import is_ssh_here, ssh_hosts
from tests.training.netns import can_make_nodes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can_make_nodes(), reason="network namespaces take root and iproute2"),
    pytest.mark.skipif(not is_ssh_here(), reason="no sshd: apt-get install openssh-server"),
]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Machines]:
    with ssh_hosts(["host0", "host1"], tmp_path) as made:
        yield made


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    made = Clone(tmp_path)
    (made.folder / "hosts").write_text("host0 slots=1\nhost1 slots=1\n")
    return made


class Run:
    """A command in the clone on host0."""

    def __init__(self, hosts: Machines, clone: Clone, *command: str, **variables: str) -> None:
        self.log = clone.folder.parent / "run.log"
        environment = {**os.environ, **clone.environment, **variables}
        command = ("env", f"--chdir={clone.folder}", *command)
        self.process: Process = hosts.start("host0", command, self.log, environment)

    @property
    def said(self) -> str:
        """On one line: the console wraps."""
        return " ".join(self.log.read_text().split())

    def await_word(self, word: str) -> None:
        wait_for(lambda: word in self.said or self.process.poll() is not None, word)
        assert word in self.said, self.said[-5000:]

    def end(self) -> int:
        return self.process.wait(400)


def nodes_sh(hosts: Machines, clone: Clone, recipe: Path) -> Run:
    return Run(hosts, clone, "bash", "deployments/nodes.sh", "hosts", str(recipe))


def test_the_hosts_of_a_hostfile_train_together_and_leave_what_one_machine_finds(hosts: Machines, clone: Clone) -> None:
    recipe = clone.recipe(20)
    run = nodes_sh(hosts, clone, recipe)
    assert run.end() == 0, run.said[-5000:]
    assert "node host1 (10.231.7.2) has joined, for up to 1 ranks" in run.said
    assert "pretrained: 2 ranks on 2 nodes" in run.said
    assert clone.is_found(recipe)


def test_sigterm_saves_a_checkpoint_and_the_same_command_goes_on(hosts: Machines, clone: Clone) -> None:
    recipe = clone.recipe(ENDLESS)
    run = nodes_sh(hosts, clone, recipe)
    run.await_word(f"step 40 of {ENDLESS}")
    run.process.terminate()
    assert run.end() == 143, run.said[-5000:]
    (step,) = re.findall(r"stopped after step (\d+), whose checkpoint is kept", run.said)
    wait_for(lambda: not seqmills(hosts), "the end of all of it", 30)

    run = nodes_sh(hosts, clone, recipe)
    run.await_word("resumed from")
    run.await_word(f"step {int(step) // 20 * 20 + 20} of {ENDLESS}")
    assert f"step {step} of {ENDLESS}" in run.said.split("resumed from")[1]
    # The script is gone without a word: what it started on other hosts ends too.
    run.process.kill()
    run.end()
    wait_for(lambda: not hosts.processes("host1", "seqmill join"), "the end of the node that joined", 30)


def test_a_host_that_is_lost_is_done_without(hosts: Machines, clone: Clone) -> None:
    recipe = clone.recipe(600)
    run = nodes_sh(hosts, clone, recipe)
    run.await_word("step 40 of 600")
    hosts.kill("host1")
    assert run.end() == 0, run.said[-5000:]
    assert "is gone; the others go on from the newest whole checkpoint" in run.said
    assert clone.is_found(recipe)


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="no pdsh, by which DeepSpeed opens hosts: apt-get install pdsh")
def test_deepspeeds_own_launcher_opens_the_hosts_and_what_ranks_tell_is_heard(hosts: Machines, clone: Clone) -> None:
    recipe = clone.recipe(20)
    settings = {"SEQMILL_LAUNCHER": "deepspeed", "SEQMILL_HOSTFILE": "hosts"}
    run = Run(hosts, clone, ".venv/bin/seqmill", "run", str(recipe), **settings)
    assert run.end() == 0, run.said[-5000:]
    (manifest,) = (clone.store / "pretrained").glob("*/manifest.json")
    produced_by = json.loads(manifest.read_text())["produced_by"]
    assert produced_by["num_ranks"] == 2
    assert [row["step"] for row in produced_by["metrics"] if "loss" in row] == [1, 20]
    assert clone.is_found(recipe)


def seqmills(hosts: Machines) -> list[int]:
    return [pid for name in hosts.names for pid in hosts.processes(name, "bin/seqmill")]
