"""A server for many: Prefect on PostgreSQL, workers of two pools as two machines, one bucket; and twenty runs at once."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from tests.e2e.hosts import Many, many_hosts
from tests.e2e.operated import wait_for
from tests.e2e.postgres import PASSWORD, postgres, postgres_binaries
from tests.e2e.world import document

BINARIES = postgres_binaries()
NUM_RUNS = 20
LONG = {"pretrained": {"num_steps": 300, "checkpoint_steps": 50, "evaluation_steps": 300}}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(BINARIES is None, reason="no PostgreSQL: apt-get install postgresql"),
]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Many]:
    assert BINARIES
    folder = tmp_path_factory.mktemp("many")
    with postgres(BINARIES) as database, many_hosts(folder, database, {"cpu": NUM_RUNS, "gpu": 2}) as many:
        yield many


@pytest.fixture(scope="module")
def handed(many: Many) -> str:
    """A run of the whole recipe over both pools."""
    run = many.up.start("pools-flow", recipe=str(many.up.recipe))
    assert many.up.end(run) == "Completed", message_of(many, run)
    return run


def message_of(many: Many, run: str) -> str:
    return str(many.up.api(f"/flow_runs/{run}", method="GET")["state"]["message"])


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")


def training(many: Many, seed: int, **fields: Any) -> str:
    """Start a longer run over both pools, and wait until it trains and has a checkpoint."""
    before = set(many.hosts["gpu"].checkpoints())
    overrides = {"pretrained": {**LONG["pretrained"], "seed": seed, **fields}}
    run = many.up.start("pools-flow", recipe=str(many.up.recipe), overrides=overrides, until="pretrained")
    wait_for(lambda: set(many.hosts["gpu"].checkpoints()) - before)
    return run


def resumed_from(many: Many) -> int:
    return int(json.loads(many.up.seqmill("show", "pretrained", "--json"))["produced_by"]["resumed_from"])


def test_the_server_keeps_its_runs_in_postgresql_and_nobody_else_knows_the_password(many: Many) -> None:
    assert many.database
    assert many.database.query("select name from flow where name = 'pools-flow'") == ["pools-flow"]
    assert list(many.up.folder.rglob("prefect.db")) == []
    for folder in (many.up.folder, *(one.folder for one in many.hosts.values())):
        for path in folder.rglob("*"):
            assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path
    (worker,) = [pid for pid in many.up.processes("worker start") if "--pool seqmill" in command_of(pid)]
    assert PASSWORD.encode() not in Path(f"/proc/{worker}/environ").read_bytes()


def test_one_pool_hands_the_next_references_and_nothing_else(many: Many, handed: str) -> None:
    legs = many.children(handed)
    assert [(leg["work_pool_name"], leg["state"]["name"]) for leg in legs] == [
        ("cpu", "Completed"), ("gpu", "Completed"), ("cpu", "Completed"),
    ]  # fmt: skip
    corpus, training, report = (leg["parameters"] for leg in legs)
    assert corpus["given"] == {}
    assert set(training["given"]) == {"blocks", "tokenizer", "examples"}
    assert set(report["given"]) >= {"archive", "blocks", "pretrained", "adapter"}
    for ref in (*training["given"].values(), *report["given"].values()):
        assert re.fullmatch(r"[a-z-]+/[0-9a-f]{64}", ref)


def test_no_path_of_a_machine_and_no_text_of_the_corpus_is_in_what_prefect_was_told(many: Many, handed: str) -> None:
    assert many.database
    told = many.database.dump("flow_run", "flow_run_state", "task_run", "task_run_state", "flow_run_input")
    assert handed in told
    assert [one.folder for one in many.hosts.values() if str(one.folder) in told] == []
    everything = many.database.dump()
    assert [i for i in range(0, 190, 10) if document(i) in everything] == []  # later ones are held out, and shown
    asked = {"flow_runs": {"id": {"any_": [handed]}}, "artifacts": {"key": {"any_": ["references"]}}}
    (references,) = many.up.api("/artifacts/filter", asked)
    stages = {row["Stage"] for row in json.loads(references["data"])}
    assert {"archive", "blocks", "pretrained", "finetuned", "adapter", "report"} <= stages


def test_each_machine_has_read_only_what_its_stages_take(many: Many, handed: str) -> None:
    def cached(pool: str, kind: str) -> set[str]:
        return {path.name for path in (many.hosts[pool].folder / "cache").glob(f"*/{kind}/*/*")}

    assert cached("gpu", "archive") <= {"manifest.json"}
    assert "blocks.arrow" in cached("gpu", "blocks-shard")
    assert "model.safetensors" in cached("gpu", "pretrained")
    assert "model.safetensors" not in cached("cpu", "pretrained")


def test_a_second_run_finds_all(many: Many, handed: str) -> None:
    again = many.up.start("pools-flow", recipe=str(many.up.recipe))
    assert many.up.end(again) == "Completed"
    assert {state for run in many.children(again) for state in many.up.tasks(run["id"]).values()} == {"Cached"}


def test_a_leg_that_fails_fails_the_run_with_its_words(many: Many, handed: str) -> None:
    run = many.up.start("pools-flow", recipe=str(many.up.recipe), overrides={"pretrained.global_batch_size": 3})
    assert many.up.end(run) == "Failed"
    assert "on the pool gpu: failed" in message_of(many, run)
    assert "2 ranks do not divide the recipe's global_batch_size 3" in message_of(many, run)


def test_a_cancel_reaches_the_legs_and_a_retry_goes_on(many: Many, handed: str) -> None:
    run = training(many, seed=31)
    many.up.prefect("flow-run", "cancel", run)
    wait_for(lambda: not many.up.processes("tasks.training.worker"))
    wait_for(lambda: many.up.state(run) == "Cancelled")
    wait_for(lambda: many.up.state(many.children(run)[-1]["id"]) == "Cancelled")
    assert_a_retry_goes_on(many, run)


def test_a_machine_that_is_lost_fails_the_run_and_a_retry_goes_on_with_the_next(many: Many, handed: str) -> None:
    run = training(many, seed=32)
    many.hosts["gpu"].end(SIGKILL)
    assert many.up.end(run) == "Failed"
    assert "on the pool gpu: crashed" in message_of(many, run)
    many.hosts["gpu"].start()
    assert_a_retry_goes_on(many, run)


def leg_that_trains(many: Many, run: str) -> dict[str, Any]:
    """The newest leg that a run has on the pool gpu."""
    return [leg for leg in many.children(run) if leg["work_pool_name"] == "gpu"][-1]


def test_a_run_that_is_killed_has_its_legs_cancelled(many: Many) -> None:
    run = training(many, seed=33, num_steps=20_000)
    leg = leg_that_trains(many, run)["id"]
    many.kill(run)
    assert many.up.end(run) == "Crashed"
    killed = time.monotonic()
    wait_for(lambda: many.up.state(leg) == "Cancelled")  # its own engine tells of a crash, before the worker says what for
    assert time.monotonic() - killed < 120
    history = many.up.api(f"/flow_run_states/?flow_run_id={leg}", method="GET")
    assert "the run that started it has ended" in [state["message"] for state in history]
    wait_for(lambda: not many.up.processes("tasks.training.worker"))


def test_a_retry_in_time_takes_over_the_leg_that_is_at_work(many: Many) -> None:
    run = training(many, seed=34, num_steps=20_000)
    leg = leg_that_trains(many, run)["id"]
    many.kill(run)
    assert many.up.end(run) == "Crashed"
    time.sleep(15)  # Prefect's worker reports the crash a second time, and would take the new try for the one that crashed
    num_cpu_legs = sum(leg["work_pool_name"] == "cpu" for leg in many.children(run))
    many.up.retry(run)
    wait_for(lambda: many.up.state(run) == "Running")
    wait_for(lambda: sum(leg["work_pool_name"] == "cpu" for leg in many.children(run)) > num_cpu_legs)
    assert (leg_that_trains(many, run)["id"], many.up.state(leg)) == (leg, "Running")
    many.up.prefect("flow-run", "cancel", run)
    wait_for(lambda: many.up.state(leg) == "Cancelled")  # its own engine tells of a crash, before the worker says what for


def test_a_new_run_waits_for_the_leg_of_one_that_was_killed_and_builds_nothing_twice(many: Many) -> None:
    run = training(many, seed=35)
    many.kill(run)
    assert many.up.end(run) == "Crashed"
    overrides = {"pretrained": {**LONG["pretrained"], "seed": 35}}
    again = many.up.start("pools-flow", recipe=str(many.up.recipe), overrides=overrides, until="pretrained")
    assert many.up.end(again) == "Completed"
    (row,) = [row for row in many.handed_over(again) if row["Stage"] == "pretrained"]
    assert row["State"] == "found" or resumed_from(many) >= 50


def assert_a_retry_goes_on(many: Many, run: str) -> None:
    num_legs = len(many.children(run))
    many.up.retry(run)
    wait_for(lambda: len(many.children(run)) > num_legs)
    assert many.up.end(run) == "Completed"
    assert resumed_from(many) >= 50


def test_twenty_runs_at_once_are_all_completed_and_no_stage_is_built_twice(many: Many) -> None:
    began = time.monotonic()
    runs = many.start_many(NUM_RUNS)
    states = Counter(many.up.end(run) for run in runs)
    print(f"{NUM_RUNS} runs at once: {time.monotonic() - began:.0f} s")
    assert states == {"Completed": NUM_RUNS}
    built = [ref for run in runs for ref in many.built_by(run)]
    assert [ref for ref, times in Counter(built).items() if times > 1] == []
    wait_for(lambda: all(many.has_told_all(run) for run in runs))
    kinds = Counter(ref.partition("/")[0] for ref in built)
    assert (kinds["blocks"], kinds["pretrained"]) == (1 + NUM_RUNS // 2, 1)


def test_twenty_runs_at_once_over_two_pools_are_all_completed_and_no_stage_is_built_twice(many: Many) -> None:
    began = time.monotonic()
    runs = many.start_many_over_pools(NUM_RUNS)
    states = Counter(many.up.end(run) for run in runs)
    print(f"{NUM_RUNS} runs at once over two pools: {time.monotonic() - began:.0f} s")
    assert states == {"Completed": NUM_RUNS}
    built = [ref for run in runs for ref in many.built_by(run)]
    assert [ref for ref, times in Counter(built).items() if times > 1] == []
    kinds = Counter(ref.partition("/")[0] for ref in built)
    assert (kinds["documents"], kinds["blocks"], kinds["pretrained"]) == (1, 1 + NUM_RUNS // 2, 1 + NUM_RUNS // 2)
    for run in runs:
        corpus, training = many.children(run)
        assert (corpus["work_pool_name"], training["work_pool_name"]) == ("cpu", "gpu")
        handed_over = {row["Stage"]: row["Reference"] for row in many.handed_over(corpus["id"])}
        assert training["parameters"]["given"] == {name: handed_over[name] for name in ("blocks", "tokenizer")}
