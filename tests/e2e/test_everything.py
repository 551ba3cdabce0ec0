"""The whole DAG as a user runs it: the command, a Prefect server, the launcher with two ranks, a server on loopback."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.corpus.http_server import serving
from tests.e2e.world import World

NODES = [
    "archive", "documents", "tokenizer", "tokens", "blocks", "pretrained", "conversations", "held_out", "examples",
    "evaluation_pretrained", "finetuned", "evaluation_finetuned", "adapter", "evaluation_adapter", "report",
]  # fmt: skip

# Prefect as the store remembers it, read through a server by a process of its own: Prefect reads its settings at import.
READ_RUNS = """
import asyncio, json, sys
from pathlib import Path
from flows.server import prefect_server
from flows.settings import load_settings

async def read():
    from prefect.client.orchestration import get_client
    async with get_client() as client:
        flows = await client.read_flow_runs()
        tasks = await client.read_task_runs(limit=200)
        artifacts = await client.read_artifacts(limit=200)
        print(json.dumps({
            "flows": [(run.name, run.state.name) for run in sorted(flows, key=lambda run: run.start_time)],
            "tasks": [(str(run.flow_run_id), run.name, run.state.name) for run in sorted(tasks, key=lambda run: run.start_time)],
            "order": [str(run.id) for run in sorted(flows, key=lambda run: run.start_time)],
            "artifacts": sorted({artifact.key for artifact in artifacts}),
        }))

with prefect_server(load_settings()):
    asyncio.run(read())
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with serving() as server:
        yield World.make(tmp_path_factory.mktemp("world"), server)


@pytest.fixture(scope="module")
def first(world: World) -> Any:
    """What the first run did; it begins in a run that is killed, with all that it started, while it pretrains."""
    process = world.start("run", "small.yaml")
    checkpoints = world.folder / "store" / ".staging" / "pretrained"
    wait_for(process, lambda: any(checkpoints.glob("*/.scratch/checkpoints/checkpoint-10/manifest.json")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return world.json("run", "small.yaml")


def wait_for(process: "subprocess.Popen[str]", happened: Any) -> None:
    """Wait until something is to be seen on disk; the test's own time limit is the bound."""
    while not happened():
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"ended before it happened: {process.communicate()[1]}")


def test_a_killed_run_is_resumed_and_what_was_finished_is_found(first: list[dict[str, Any]]) -> None:
    assert [row["name"] for row in first] == NODES
    status = {row["name"]: row["status"] for row in first}
    assert {name for name, found in status.items() if found == "found"} == set(NODES[:5])
    assert {name for name, found in status.items() if found == "built"} == set(NODES[5:])


def test_pretraining_went_on_from_the_checkpoint(world: World, first: Any) -> None:
    pretrained = world.json("show", "pretrained")
    assert pretrained["produced_by"]["resumed_from"] == 10
    assert pretrained["produced_by"]["num_ranks"] == 2
    losses = [row["validation_loss"] for row in pretrained["produced_by"]["metrics"] if "validation_loss" in row]
    assert losses[-1] < losses[0]


def test_the_ledger_counts_the_bad_line_and_every_token(world: World, first: Any) -> None:
    documents, blocks = world.json("show", "documents")["stats"], world.json("show", "blocks")["stats"]
    assert (documents["num_lines"], documents["num_documents"], documents["num_quarantined"]) == (601, 600, 1)
    for split in ("train", "validation"):
        counts = blocks[split]
        assert counts["num_tokens"] == counts["num_blocks"] * 64 + counts["num_remainder"]
        assert counts["num_remainder"] < 64


def test_held_out_conversations_are_not_trained_on(world: World, first: Any) -> None:
    stats = world.json("show", "examples")["stats"]
    assert (stats["num_conversations"], stats["num_in_held_out"]) == (200, 10)


def test_the_second_run_finds_everything(world: World, first: list[dict[str, Any]]) -> None:
    again = world.json("run", "small.yaml")
    assert {row["status"] for row in again} == {"found"}
    assert [row["key"] for row in again] == [row["key"] for row in first]
    runs = json.loads(subprocess.check_output([sys.executable, "-c", READ_RUNS], env=world.environment, text=True))
    states = {name: state for run, name, state in runs["tasks"] if run == runs["order"][-1]}
    assert states == {f"small {name}": "Cached" for name in NODES}
    built = {name: state for run, name, state in runs["tasks"] if run == runs["order"][-2]}
    assert (built["small blocks"], built["small adapter"]) == ("Cached", "Completed")
    assert runs["flows"][-2:] == [["small.yaml to report", "Completed"]] * 2
    shown = {"report", "documents", "documents-ledger", "tokens-splits", "blocks-ledger", "blocks-shards", "examples-ledger"}
    shown |= {"run", "pretrained", "examples-mask", "evaluation-adapter", "report-page"}
    shown |= {"progress-archive", "progress-documents", "progress-tokens", "progress-pretrained", "progress-evaluation-finetuned"}
    assert shown <= set(runs["artifacts"])


def test_a_change_rebuilds_only_what_stands_on_it(world: World, first: Any) -> None:
    rows = world.json("plan", "small.yaml", "--set", "adapter.lora.rank=2")
    assert {row["name"]: row["status"] for row in rows if row["status"] != "found"} == {
        "adapter": "build",
        "evaluation_adapter": "unknown",
        "report": "unknown",
    }
    assert next(row["reason"] for row in rows if row["name"] == "adapter") == "spec.lora.rank 4 -> 2"


def test_the_listing_is_documented_and_stable(world: World, first: Any) -> None:
    rows = world.json("ls")
    assert {row["kind"] for row in rows} == {
        "archive", "documents", "tokenizer", "tokens", "blocks", "pretrained", "examples", "finetuned", "adapter",
        "evaluation", "report",
    }  # fmt: skip
    for row in rows:
        assert list(row) == ["kind", "key", "content", "path", "created", "num_bytes", "stats"]
        assert Path(row["path"], "manifest.json").is_file()


def test_every_artifact_is_whole_and_its_counts_add_up(world: World, first: Any) -> None:
    verified = world.json("verify")
    assert verified["problems"] == []
    assert verified["num_artifacts"] == len(list((world.folder / "store").glob("[!.]*/*/manifest.json")))


def test_the_report_is_one_page_that_asks_nothing_of_the_network(world: World, first: Any) -> None:
    page = Path(world.json("show", "report")["path"], "report.html").read_text()
    assert "<title>" in page
    assert 'src="http' not in page
    assert 'href="http' not in page
    assert page.count("<svg") + page.count("data:image") >= 3


@pytest.mark.parametrize("kind", ["pretrained", "adapter"])
def test_a_trained_model_speaks(world: World, first: Any, kind: str) -> None:
    said = world.json("generate", kind, "--prompt", "山里", "--max-new-tokens", "4")
    assert said["ref"].startswith(f"{kind}/")
    assert isinstance(said["text"], str)


def test_nothing_that_was_started_outlives_the_command(world: World, first: Any) -> None:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            assert str(world.folder) not in command, command
