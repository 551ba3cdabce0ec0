"""The whole DAG as a user runs it: the command, a Prefect server, the launcher with two ranks, a server on loopback."""

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.server import prefect_server
from flows.settings import load_settings
from tests.corpus.http_server import serving
from tests.e2e.world import World

NODES = [
    "archive", "documents", "tokenizer", "tokens", "blocks", "pretrained", "conversations", "held_out", "examples",
    "evaluation_pretrained", "finetuned", "evaluation_finetuned", "adapter", "evaluation_adapter", "report",
]  # fmt: skip


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


@dataclass
class Second:
    """What the second run did, and Prefect as the store remembers it: runs, oldest first, and what they showed."""

    rows: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    artifacts: set[str]

    def tasks_of(self, position: int) -> dict[str, str]:
        run = self.runs[position]["id"]
        return {task["name"]: task["state"]["name"] for task in self.tasks if task["flow_run_id"] == run}


@pytest.fixture(scope="module")
def second(world: World, first: Any) -> Second:
    with prefect_server(load_settings(store=world.folder / "store")) as url:

        def read(path: str, **body: Any) -> list[dict[str, Any]]:
            return list(httpx.post(f"{url}/{path}/filter", json=body, trust_env=False).raise_for_status().json())

        rows = replace(world, prefect_url=url).json("run", "small.yaml")
        runs = read("flow_runs", sort="START_TIME_ASC")
        return Second(rows, runs, read("task_runs", limit=200), {one["key"] for one in read("artifacts", limit=200)})


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
    pretrained = world.json_here("show", "pretrained")
    assert pretrained["produced_by"]["resumed_from"] == 10
    assert pretrained["produced_by"]["num_ranks"] == 2
    losses = [row["validation_loss"] for row in pretrained["produced_by"]["metrics"] if "validation_loss" in row]
    assert losses[-1] < losses[0]


def test_the_ledger_counts_the_bad_line_and_every_token(world: World, first: Any) -> None:
    documents, blocks = world.json_here("show", "documents")["stats"], world.json_here("show", "blocks")["stats"]
    assert (documents["num_lines"], documents["num_documents"], documents["num_quarantined"]) == (601, 600, 1)
    for split in ("train", "validation"):
        counts = blocks[split]
        assert counts["num_tokens"] == counts["num_blocks"] * 64 + counts["num_remainder"]
        assert counts["num_remainder"] < 64


def test_held_out_conversations_are_not_trained_on(world: World, first: Any) -> None:
    stats = world.json_here("show", "examples")["stats"]
    assert (stats["num_conversations"], stats["num_in_held_out"]) == (200, 10)


def test_the_second_run_finds_everything(first: list[dict[str, Any]], second: "Second") -> None:
    assert {row["status"] for row in second.rows} == {"found"}
    assert [row["key"] for row in second.rows] == [row["key"] for row in first]
    assert [(run["name"], run["state"]["name"]) for run in second.runs[-2:]] == [("small.yaml to report", "Completed")] * 2
    assert second.tasks_of(-1) == {f"small {name}": "Cached" for name in NODES}
    built = second.tasks_of(-2)
    assert (built["small blocks"], built["small adapter"]) == ("Cached", "Completed")
    shown = {"report", "documents", "documents-ledger", "tokens-splits", "blocks-ledger", "blocks-shards", "examples-ledger"}
    shown |= {"run", "pretrained", "examples-mask", "evaluation-adapter", "report-page"}
    shown |= {"progress-archive", "progress-documents", "progress-tokens", "progress-pretrained", "progress-evaluation-finetuned"}
    assert shown <= second.artifacts


def test_a_change_rebuilds_only_what_stands_on_it(world: World, first: Any) -> None:
    rows = world.json_here("plan", "small.yaml", "--set", "adapter.lora.rank=2")
    assert {row["name"]: row["status"] for row in rows if row["status"] != "found"} == {
        "adapter": "build",
        "evaluation_adapter": "unknown",
        "report": "unknown",
    }
    assert next(row["reason"] for row in rows if row["name"] == "adapter") == "spec.lora.rank 4 -> 2"


def test_the_listing_is_documented_and_stable(world: World, first: Any) -> None:
    rows = world.json_here("ls")
    assert {row["kind"] for row in rows} == {
        "archive", "documents", "tokenizer", "tokens", "blocks", "pretrained", "examples", "finetuned", "adapter",
        "evaluation", "report",
    }  # fmt: skip
    for row in rows:
        assert list(row) == ["kind", "key", "content", "path", "created", "num_bytes", "stats"]
        assert Path(row["path"], "manifest.json").is_file()


def test_every_artifact_is_whole_and_its_counts_add_up(world: World, first: Any) -> None:
    verified = world.json_here("verify")
    assert verified["problems"] == []
    assert verified["num_artifacts"] == len(list((world.folder / "store").glob("[!.]*/*/manifest.json")))


def test_the_report_is_one_page_that_asks_nothing_of_the_network(world: World, first: Any) -> None:
    page = Path(world.json_here("show", "report")["path"], "report.html").read_text()
    assert "<title>" in page
    assert 'src="http' not in page
    assert 'href="http' not in page
    assert page.count("<svg") + page.count("data:image") >= 3


@pytest.mark.parametrize("kind", ["pretrained", "adapter"])
def test_a_trained_model_speaks(world: World, first: Any, kind: str) -> None:
    said = world.json_here("generate", kind, "--prompt", "山里", "--max-new-tokens", "4")
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
