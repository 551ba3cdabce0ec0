"""Everyday operation: a server and a worker that stay, runs that are started, cancelled, killed and retried, changed data."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.operated import LONG, SECRET, Operated, operated, wait_for
from tests.e2e.world import corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FLOWS = ["corpus-flow", "pretrain-flow", "sft-flow", "adapt-flow", "everything-flow", "watch-flow"]
UPKEEP = ["verify-flow", "gc-flow"]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    folder = tmp_path_factory.mktemp("operated")
    with operated(folder) as store:
        yield store
    assert store.processes() == []
    assert store.seqmill("down") == "nothing runs\n"


@pytest.fixture(scope="module")
def first(up: Operated) -> str:
    """A run that the card's own command starts and watches."""
    told = up.prefect("deployment", "run", "pretrain-flow", "--param", f"recipe={up.recipe}", "--watch")
    assert "finished successfully" in told
    return str(up.runs_of("pretrain-flow")[-1]["id"])


def training(up: Operated, seed: int, **fields: int) -> str:
    """Start a longer run, and wait until it trains and has a checkpoint of its own."""
    before = set(up.checkpoints())
    overrides = {"pretrained": {**LONG["pretrained"], "seed": seed, **fields}}
    run = up.start("pretrain-flow", recipe=str(up.recipe), overrides=overrides)
    wait_for(lambda: set(up.checkpoints()) - before)
    return run


def resumed_from(up: Operated) -> int:
    return int(json.loads(up.seqmill("show", "pretrained", "--json"))["produced_by"]["resumed_from"])


def test_up_again_leaves_what_runs_and_every_flow_has_its_deployment(up: Operated) -> None:
    before = [up.service(name) for name in ("server", "worker")]
    assert f"http://127.0.0.1:{up.port}" in up.up()
    assert [up.service(name) for name in ("server", "worker")] == before
    assert sorted(entry["name"] for entry in up.api("/deployments/filter", {})) == sorted([*FLOWS, *UPKEEP])
    automations = [entry["name"] for entry in up.api("/automations/filter", {})]
    assert sorted(automations) == ["seqmill-corpus-changed", "seqmill-crashed"]


@pytest.mark.parametrize(("host", "is_allowed"), [("127.0.0.1", True), ("localhost", True), ("evil.example", False)])
def test_only_a_page_of_the_server_itself_may_speak_to_it(up: Operated, host: str, is_allowed: bool) -> None:
    origin = f"http://{host}:{up.port}"
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answer = httpx.options(f"http://127.0.0.1:{up.port}/api/flow_runs/filter", headers=asked, trust_env=False)
    assert (answer.headers.get("access-control-allow-origin") == origin) == is_allowed
    assert answer.is_success == is_allowed


def test_the_server_plans_the_runs_of_its_schedules(up: Operated) -> None:
    def planned() -> set[str]:
        """The deployments that have runs to come."""
        runs = up.api("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}})
        return {run["deployment_id"] for run in runs if run["auto_scheduled"]}

    wait_for(lambda: len(planned()) == 2)  # nightly and hourly


def test_the_very_command_of_the_card_starts_a_run(up: Operated) -> None:
    told = up.prefect("deployment", "run", "pretrain-flow", "--start-in", "in 1 hour")
    assert "Creating flow run for deployment 'pretrain-flow/pretrain-flow'" in told
    up.api(f"/flow_runs/{up.runs_of('pretrain-flow')[-1]['id']}", method="DELETE")


def test_the_form_shows_typed_fields_with_their_descriptions(up: Operated) -> None:
    for flow in [*FLOWS, *UPKEEP]:
        schema = up.api(f"/deployments/name/{flow}/{flow}", method="GET")["parameter_openapi_schema"]["properties"]
        assert [name for name, field in schema.items() if not field.get("description")] == []
        if flow in UPKEEP:
            continue
        block_size = schema["overrides"]["properties"]["blocks"]["properties"]["block_size"]
        assert (block_size["type"], block_size["description"]) == ("integer", "token ids a block")


def test_a_second_run_finds_all(up: Operated, first: str) -> None:
    again = up.start("pretrain-flow", recipe=str(up.recipe), overrides={"blocks": {"block_size": 64}})
    assert up.end(again) == "Completed"
    stages = {name: state for name, state in up.tasks(again).items() if name.startswith("small ")}
    assert set(stages.values()) == {"Cached"}
    assert {f"small {name}" for name in ("archive", "documents", "tokenizer", "tokens", "blocks", "pretrained")} == set(stages)


def test_changed_data_starts_a_run_that_builds_only_what_changed(up: Operated, first: str) -> None:
    def watch() -> str:
        run = up.start("watch-flow", recipe=str(up.recipe))
        assert up.end(run) == "Completed"
        return str(up.api(f"/flow_runs/{run}", method="GET")["state"]["message"])

    assert watch().startswith("nothing changed")
    os.utime(up.folder / "corpus")
    assert watch().startswith("nothing changed")
    before, shards_before = len(up.runs_of("pretrain-flow")), set((up.store / "tokens-shard").iterdir())
    (up.folder / "corpus").write_bytes(corpus(620))
    assert watch() == "changed: archive"
    wait_for(lambda: len(up.runs_of("pretrain-flow")) > before)
    run = up.runs_of("pretrain-flow")[-1]
    (change,) = run["parameters"]["changes"]
    assert (change["name"], change["old"] != change["new"]) == ("archive", True)
    assert up.end(run["id"]) == "Completed"
    states = up.tasks(run["id"])
    assert states["small tokenizer"] == "Cached"
    assert states["small tokens"] == "Completed"
    shards_after = set((up.store / "tokens-shard").iterdir())
    assert 0 < len(shards_after - shards_before) < len(shards_before)
    assert watch().startswith("nothing changed")
    assert len(up.runs_of("pretrain-flow")) == before + 1


def test_a_cancelled_run_ends_every_rank_and_a_newer_run_goes_on_from_its_checkpoint(up: Operated, first: str) -> None:
    fields = {"seed": 21, "num_steps": 1_500}  # it trains yet when the newer run has begun and the cancel arrives
    run = training(up, **fields)
    overrides = {"pretrained": {**LONG["pretrained"], **fields}}
    newer = up.start("everything-flow", recipe=str(up.recipe), overrides=overrides, until="pretrained")
    wait_for(lambda: up.state(newer) == "AwaitingTurn")
    assert "pretrained" in up.api(f"/flow_runs/{newer}", method="GET")["state"]["message"]
    up.prefect("flow-run", "cancel", run)
    wait_for(lambda: not up.processes("tasks.training.worker"))
    wait_for(lambda: up.state(run) == "Cancelled")
    assert up.end(newer) == "Completed"
    assert resumed_from(up) >= 50


def test_a_killed_flow_is_crashed_and_a_retry_goes_on(up: Operated, first: str) -> None:
    run = training(up, seed=22)
    for pid in up.processes("prefect.engine"):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not up.processes("tasks.training.worker"))
    assert up.end(run) == "Crashed"
    # The worker comes back to it some 10 s later: a retry before that would be taken for the run that crashed.
    wait_for(lambda: "Check whether the flow run exceeded its memory" in messages(up, run))
    assert_a_retry_goes_on(up, run)


def test_a_killed_worker_leaves_no_rank_and_the_next_one_goes_on(up: Operated, first: str) -> None:
    run = training(up, seed=23)
    os.kill(up.service("worker"), signal.SIGKILL)
    wait_for(lambda: not up.processes("prefect.engine") and not up.processes("tasks.training.worker"))
    assert up.end(run) == "Crashed"
    up.up()
    assert_a_retry_goes_on(up, run)


def test_down_ends_runs_under_way_and_after_up_a_retry_goes_on(up: Operated, first: str) -> None:
    run = training(up, seed=25)
    up.seqmill("down")
    assert up.processes() == []
    up.up()
    assert up.state(run) == "Cancelled"
    assert_a_retry_goes_on(up, run)


def test_a_run_that_says_nothing_any_more_is_crashed(up: Operated, first: str) -> None:
    run = training(up, seed=24)
    os.kill(up.service("worker"), signal.SIGKILL)
    for pid in up.processes("prefect.engine"):
        os.kill(pid, signal.SIGKILL)
    assert up.end(run) == "Crashed"
    assert "no heartbeat" in up.api(f"/flow_runs/{run}", method="GET")["state"]["message"]
    assert up.processes("tasks.training.worker") == []
    up.up()


def test_a_run_that_was_told_as_crashed_while_the_server_was_away_goes_on(up: Operated, first: str) -> None:
    run = training(up, seed=26)
    told = {"type": "CRASHED", "message": "no heartbeat for 90 s"}  # what deployments/automations.yaml says of a run that lives
    up.api(f"/flow_runs/{run}/set_state", {"state": told, "force": True})
    assert up.state(run) == "Crashed"
    wait_for(lambda: up.state(run) == "Running")
    assert up.end(run) == "Completed"


def test_the_store_is_kept_up_by_flows(up: Operated, first: str) -> None:
    def message(flow: str, ends: str, **parameters: Any) -> str:
        run = up.start(flow, **parameters)
        assert up.end(run) == ends
        return str(up.api(f"/flow_runs/{run}", method="GET")["state"]["message"])

    assert "would be moved to the trash" in message("gc-flow", "Completed", dry_run=True)
    assert ", none damaged, " in message("verify-flow", "Completed")
    (tokenizer,) = (up.store / "tokenizer").glob("*/tokenizer.json")
    whole = tokenizer.read_bytes()
    tokenizer.chmod(0o644)
    tokenizer.write_bytes(whole.replace(b"{", b"[", 1))
    assert "1 damaged" in message("verify-flow", "Failed", refs=["tokenizer"])
    tokenizer.write_bytes(whole)


def test_eight_runs_at_once_lose_nothing(up: Operated, first: str) -> None:
    command = [sys.executable, "-c", "from flows.cli import main; main()", "run", str(up.recipe), "--until", "blocks"]
    before = {run["id"] for run in up.runs_of("everything-flow")}
    processes = [
        subprocess.Popen(
            [*command, "--set", f"blocks.block_size={32 + i}"], env=up.environment, stderr=subprocess.PIPE, text=True
        )
        for i in range(8)
    ]
    told = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, told
    runs = [run for run in up.runs_of("everything-flow") if run["id"] not in before]
    assert [run["state"]["name"] for run in runs] == ["Completed"] * 8
    counts = {len(up.tasks(run["id"])) for run in runs}
    assert len(counts) == 1, counts  # whatever SQLite was locked for was asked again


def test_a_secret_of_the_environment_is_nowhere_in_the_store_the_logs_or_the_database(up: Operated, first: str) -> None:
    for path in up.folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def assert_a_retry_goes_on(up: Operated, run: str) -> None:
    up.retry(run)
    wait_for(lambda: up.state(run) == "Running")
    assert up.end(run) == "Completed"
    assert resumed_from(up) >= 50


def messages(up: Operated, run: str) -> str:
    body = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_DESC"}
    return "\n".join(entry["message"] for entry in up.api("/logs/filter", body))
