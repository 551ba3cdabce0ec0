"""Several nodes from the same settings: what deployments/ starts on each, with a scheduler, ssh and seqmill that only tell."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.settings import Settings, load_settings
from tasks.errors import SettingsError

ROOT = Path(__file__).parents[2]
TELL = """#!/usr/bin/env bash
echo "$SEQMILL_NODE_RANK $SEQMILL_NODES $SEQMILL_RENDEZVOUS $SEQMILL_NUM_RANKS $SEQMILL_STORE $*" >>"$TOLD"
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@"; done
"""
SSH = '#!/usr/bin/env bash\nshift 2; host=$1; shift\necho "ssh $host" >>"$TOLD"\nexec env -u SEQMILL_NODES "$@"\n'


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone in which every command only tells what it was given."""
    for path, text in (
        (".venv/bin/seqmill", TELL),
        ("bin/srun", SRUN),
        ("bin/ssh", SSH),
        ("bin/scontrol", "#!/bin/sh\necho a1\necho a2\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    return tmp_path


def told(clone: Path, *command: str, **variables: str) -> list[str]:
    environment = {"PATH": f"{clone / 'bin'}:{os.environ['PATH']}", "TOLD": str(clone / "told"), **variables}
    subprocess.run(["bash", *command], check=True, cwd=clone, env=environment)
    return sorted((clone / "told").read_text().splitlines())


def test_slurm_starts_node_0_and_one_that_joins_on_every_other(clone: Path) -> None:
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_SUBMIT_DIR": str(clone)}
    assert told(clone, str(ROOT / "deployments/nodes.sbatch"), **slurm) == [
        f"0 1:2 a1:29400  {clone}/store run seq-monkey-small",
        f"1 1:2 a1:29400  {clone}/store run seq-monkey-small",
    ]


def test_a_hostfile_starts_its_first_host_here_and_the_others_through_ssh(clone: Path) -> None:
    (clone / "hosts").write_text("# ours\nhost0 slots=8\n\nhost1 slots=4\n")
    script = str(ROOT / "deployments/nodes.sh")
    assert told(clone, script, "hosts", "demo", SEQMILL_STORE="/mnt/a b") == [
        " 1:2 host0:29400 4 /mnt/a b join",
        " 1:2 host0:29400 8 /mnt/a b run demo",
        "ssh host1",
    ]


def test_the_kubernetes_job_sets_what_settings_know() -> None:
    _, job = yaml.safe_load_all((ROOT / "deployments/nodes-kubernetes.yaml").read_text())
    pod: dict[str, Any] = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    names = [entry["name"] for entry in container["env"]]
    assert {name.removeprefix("SEQMILL_").lower() for name in names} <= set(Settings.model_fields)
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    settings = load_settings(nodes=values["SEQMILL_NODES"], rendezvous=values["SEQMILL_RENDEZVOUS"])
    nodes = settings.machine().training.nodes
    assert nodes
    assert nodes.most == job["spec"]["completions"] == job["spec"]["parallelism"]


@pytest.mark.parametrize("name", ["nodes.sbatch", "nodes.sh", "nodes-kubernetes.yaml"])
def test_two_lines_are_to_be_edited(name: str) -> None:
    text = (ROOT / "deployments" / name).read_text()
    assert text.count("# edit: ") == 2


def test_nodes_and_a_hostfile_are_not_set_together(tmp_path: Path) -> None:
    settings = load_settings(nodes="2", rendezvous="a:1", hostfile=tmp_path / "hosts")
    with pytest.raises(SettingsError, match=r"^hostfile: set beside nodes, where each node tells its own ranks; unset one"):
        settings.machine()
