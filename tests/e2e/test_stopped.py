"""`seqmill run` ended while it trains. By SIGTERM: it saves a checkpoint, says so in one line, and goes on when run again. By
SIGKILL: the next command tells Prefect's server that it crashed."""

import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from tests.corpus.http_server import serving
from tests.e2e.world import World


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the command", "all its processes"])  # as Slurm does at a time limit
def test_the_command_told_to_stop_saves_a_checkpoint_and_goes_on_from_it(tmp_path: Path, whom: str) -> None:
    with serving() as server:
        world = World.make(tmp_path, server)
        options = ("run", "small.yaml", "--until", "pretrained", "--set", "pretrained.checkpoint_steps=1000000")
        longer = ("--set", "pretrained.num_steps=400")
        process = world.start(*options, *longer)
        wait_for_a_report(process, tmp_path / "store" / ".staging" / "pretrained")
        for pid in [process.pid, *(descendants(process.pid) if whom == "all its processes" else [])]:
            os.kill(pid, signal.SIGTERM)
        _, told = process.communicate()
        assert process.returncode == 143, told
        assert "error: pretrained: stopped after step " in " ".join(told.split())
        assert "Traceback" not in told
        world.json(*options, *longer)
        assert 1 <= world.json("show", "pretrained")["produced_by"]["resumed_from"] < 400


@pytest.mark.slow
def test_a_command_that_was_killed_is_told_as_crashed_by_the_next_one(tmp_path: Path) -> None:
    with serving() as server:
        world = World.make(tmp_path, server)
        options = ("run", "small.yaml", "--until", "pretrained")
        process = world.start(*options, "--set", "pretrained.num_steps=400")
        wait_for_a_report(process, tmp_path / "store" / ".staging" / "pretrained")
        process.kill()
        process.communicate()
        assert told_of_runs(tmp_path) == ["Running"]
        world.json(*options)
        assert told_of_runs(tmp_path) == ["Crashed", "Completed"]
        with sqlite3.connect(tmp_path / "store" / ".prefect" / "prefect.db") as database:
            tasks = database.execute("select name, state_type from task_run where state_type != 'COMPLETED'").fetchall()
            assert tasks == [("small pretrained", "CRASHED")]
            ((message,),) = database.execute("select message from flow_run_state where name = 'Crashed'").fetchall()
        assert message == "its process was killed; what is finished is kept, run it again to go on"


def descendants(pid: int) -> list[int]:
    """Its children, theirs, and so on."""
    told = subprocess.run(["pgrep", "--parent", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [found for child in map(int, told) for found in (child, *descendants(child))]


def told_of_runs(folder: Path) -> list[str]:
    """The states of the runs that the store's server remembers, oldest first."""
    with sqlite3.connect(folder / "store" / ".prefect" / "prefect.db") as database:
        return [name for (name,) in database.execute("select state_name from flow_run order by created")]


def wait_for_a_report(process: "subprocess.Popen[str]", staging: Path) -> None:
    """Wait until training has reported; the test's own time limit is the bound."""
    while not any(path.stat().st_size for path in staging.glob("*/.scratch/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
