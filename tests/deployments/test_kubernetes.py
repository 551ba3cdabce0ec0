"""Every Kubernetes manifest against the schemas of Kubernetes' own API, by kubernetes-validate: no field that the API has not.

What the schemas do not say, and people get wrong, is checked by hand below.
"""

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

FOLDER = Path(__file__).parents[2] / "deployments"
# From the release that nodes-kubernetes.yaml names to the newest that the package knows.
RELEASES = ("1.33", "1.34", "1.35", "1.36", "1.37")


def nodes_manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "nodes-kubernetes.yaml").read_text()))


def job_of_a_run() -> dict[str, Any]:
    """The Job that Prefect's worker makes of the template and a deployment's variables, for one run."""
    template = json.loads((FOLDER / "kubernetes-job.json").read_text())
    deployment, *_ = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())["deployments"]
    no_server: Any = object()  # there is no block to be asked for
    values = deployment["work_pool"]["job_variables"]
    made = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(template, values, client=no_server))
    made.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="red-fox"))
    return dict(made.job_manifest)


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    return dict(job["spec"]["template"]["spec"])


@pytest.mark.parametrize("release", RELEASES)
def test_the_api_takes_every_field_of_every_manifest(release: str) -> None:
    manifests = [*nodes_manifests(), job_of_a_run()]
    assert [manifest["kind"] for manifest in manifests] == ["Service", "Job", "Job"]
    for manifest in manifests:
        kubernetes_validate.validate(manifest, release, strict=True)


@pytest.mark.parametrize(
    ("place", "field", "value"),
    [
        ((), "complations", 4),
        (("template", "spec"), "parallelism", 4),  # Prefect's own template has it there
        (("template", "spec", "containers", 0), "resorces", {}),
        (("podFailurePolicy", "rules", 0), "onPodConditions", [{"status": "True"}]),
    ],
)
def test_a_field_that_the_api_has_not_is_found(place: tuple[Any, ...], field: str, value: Any) -> None:
    _, job = nodes_manifests()
    inner = job["spec"]
    for name in place:
        inner = inner[name]
    inner[field] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, RELEASES[-1], strict=True)


def test_pod_0_has_the_name_by_which_the_others_reach_it() -> None:
    service, job = nodes_manifests()
    pod = pod_of(job)
    environment = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    # An indexed Job gives its pods the host names JOB-0, JOB-1, ...; the pod's subdomain must be the Service's name.
    host, _, port = environment["SEQMILL_RENDEZVOUS"].partition(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True  # nothing tells readiness, and node 0 is asked for at once
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert [entry["port"] for entry in service["spec"]["ports"]] == [int(port)]


def test_the_job_is_indexed_and_ends_with_pod_0() -> None:
    _, job = nodes_manifests()
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]  # all at the same time
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    # What the API refuses with these together: a policy for failed pods takes pods that never restart in place.
    assert pod_of(job)["restartPolicy"] == "Never"
    assert spec["backoffLimitPerIndex"] > 0
    assert spec.get("podReplacementPolicy", "Failed") == "Failed"  # never two pods 0
    failed = next(rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")
    assert failed["onExitCodes"]["containerName"] == pod_of(job)["containers"][0]["name"]


def test_a_mistake_of_the_user_is_the_exit_code_that_ends_the_job() -> None:
    from tasks.errors import RecipeError, SettingsError, WorkerError

    _, job = nodes_manifests()
    rules = job["spec"]["podFailurePolicy"]["rules"]
    (codes,) = (rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule)
    assert codes == [RecipeError.exit_code] == [SettingsError.exit_code]
    assert WorkerError.exit_code not in codes


@pytest.mark.parametrize("job", [nodes_manifests()[1], job_of_a_run()], ids=["nodes", "run"])
def test_a_pod_has_what_training_takes(job: dict[str, Any]) -> None:
    pod = pod_of(job)
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] > 0  # a limit: GPUs have no request of their own
    assert {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]} == {"/store": "store", "/dev/shm": "shm"}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert volumes["shm"] == {"emptyDir": {"medium": "Memory"}}  # 64 MB otherwise, too little for NCCL
    # The image's user, by number: `useradd --uid 1000` of the Containerfile.
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000
    assert "--uid 1000" in (FOLDER / "Containerfile").read_text()
    stop_seconds = next(entry["value"] for entry in container["env"] if entry["name"] == "SEQMILL_STOP_SECONDS")
    assert float(stop_seconds) < pod["terminationGracePeriodSeconds"]


def test_tokens_come_from_a_secret_that_need_not_be() -> None:
    (container,) = pod_of(nodes_manifests()[1])["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "seqmill-tokens", "optional": True}}]
    assert not any("TOKEN" in entry["name"] for entry in container["env"])
