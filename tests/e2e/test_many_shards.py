"""More than 500 shards against a real server: few tasks, all of them told, and the log of each stage kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.server import prefect_server
from flows.settings import load_settings
from tasks.stages import MOST_GROUPS
from tests.corpus.http_server import serving
from tests.e2e.many_shards import write_many_shards
from tests.e2e.world import World


@pytest.mark.slow
def test_five_hundred_shards_are_some_fifty_tasks_and_each_stage_has_one_bar(tmp_path: Path) -> None:
    with serving() as published, prefect_server(load_settings(store=tmp_path / "store")) as url:
        world = replace(World.make(tmp_path, published), prefect_url=url)
        world.json("run", write_many_shards(world), "--until", "blocks")

        def read(path: str, **body: Any) -> list[dict[str, Any]]:
            return list(httpx.post(f"{url}/{path}/filter", json=body, trust_env=False).raise_for_status().json())

        (run,) = read("flow_runs")
        tasks = [task["name"] for task in read("task_runs", limit=200)]
        artifacts = {artifact["key"]: artifact for artifact in read("artifacts/latest")}
        levels = {entry["name"]: entry["level"] for entry in read("logs", limit=200)}
    assert len(list((tmp_path / "store" / "tokens-shard").glob("*"))) > 500
    assert run["name"] == "many-shards.yaml to blocks"
    stages = {f"many-shards {name}" for name in ("archive", "documents", "tokenizer", "tokens", "blocks")}
    groups = sorted(set(tasks) - stages)
    assert stages <= set(tasks)
    assert len(tasks) == len(stages) + len(groups) <= len(stages) + 2 * MOST_GROUPS
    assert groups[0] == "many-shards blocks shards 0-22"
    assert artifacts["progress-tokens"]["data"] == 100
    assert artifacts["progress-tokens"]["description"].startswith("many-shards tokens: 542 of 542 shards")
    assert artifacts["run"]["description"] == "many-shards: 0 of 5 stages found, 5 built"
    assert len(artifacts["tokens-shards"]["data"]) < 5000, "a table of every shard is no page"
    assert levels["tasks.store.stage"] == 20
