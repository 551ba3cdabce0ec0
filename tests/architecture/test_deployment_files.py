"""The files of deployments/: every flow is deployed, every entrypoint is there, two lines are to be edited."""

import ast
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deployments"
POOLS = ["gpu-host.yaml", "docker.yaml", "kubernetes.yaml", "slurm.yaml"]


def deployments(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load((FOLDER / name).read_text())["deployments"])


def flows_in(path: Path) -> dict[str, str]:
    """The flows that a file defines: function to flow's name."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        for mark in getattr(node, "decorator_list", []):
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "flow":
                found[node.name] = next(ast.literal_eval(word.value) for word in mark.keywords if word.arg == "name")
    return found


def test_every_flow_of_one_machine_has_a_deployment_of_its_own_name() -> None:
    deployed = {entry["entrypoint"]: entry["name"] for entry in deployments("prefect.yaml")}
    defined = {
        f"flows/{path.name}:{function}": name
        for path in (ROOT / "flows").glob("*.py")
        for function, name in flows_in(path).items()
    }
    on_pools = {entry["entrypoint"] for entry in deployments("pools.yaml")}
    assert deployed == {entrypoint: name for entrypoint, name in defined.items() if entrypoint not in on_pools}


@pytest.mark.parametrize("name", ["prefect.yaml", "pools.yaml", *POOLS])
def test_every_deployment_names_a_flow_that_is_there(name: str) -> None:
    for entry in deployments(name):
        path, _, function = entry["entrypoint"].partition(":")
        assert function in flows_in(ROOT / path)


@pytest.mark.parametrize("names", [["gpu-host.yaml"], ["docker.yaml"], ["kubernetes.yaml"], ["slurm.yaml", "slurm.sbatch"]])
def test_a_work_pool_is_set_up_by_editing_two_lines(names: list[str]) -> None:
    lines = [line for name in names for line in (FOLDER / name).read_text().splitlines()]
    assert len([line for line in lines if "# edit:" in line]) == 2


def test_the_crash_of_a_run_is_seen_after_three_heartbeats_of_its_worker() -> None:
    from flows.deployed import NO_HEARTBEAT
    from flows.up import WORKER_ENVIRONMENT

    (crashed,) = yaml.safe_load((FOLDER / "automations.yaml").read_text())["automations"]
    assert crashed["trigger"]["within"] == 3 * int(WORKER_ENVIRONMENT["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert crashed["actions"][0]["message"].startswith(NO_HEARTBEAT)


def test_every_variable_of_the_kubernetes_job_is_one_that_it_has() -> None:
    template = json.loads((FOLDER / "kubernetes-job.json").read_text())
    (entry, *_) = deployments("kubernetes.yaml")
    assert set(entry["work_pool"]["job_variables"]) <= set(template["variables"]["properties"])
    manifest = json.dumps(template["job_configuration"])
    assert "{{ claim }}" in manifest
    assert "{{ gpus }}" in manifest


def test_the_slurm_script_is_one_that_bash_reads() -> None:
    subprocess.run(["bash", "-n", FOLDER / "slurm.sbatch"], check=True)
