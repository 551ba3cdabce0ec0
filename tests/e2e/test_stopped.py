"""`seqmill run` told SIGTERM while it trains: it saves a checkpoint, says so in one line, and goes on when run again."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.corpus.http_server import serving
from tests.e2e.world import World


@pytest.mark.slow
def test_the_command_told_to_stop_saves_a_checkpoint_and_goes_on_from_it(tmp_path: Path) -> None:
    with serving() as server:
        world = World.make(tmp_path, server)
        options = ("run", "small.yaml", "--until", "pretrained", "--set", "pretrained.checkpoint_steps=1000000")
        longer = ("--set", "pretrained.num_steps=400")
        process = world.start(*options, *longer)
        wait_for_a_report(process, tmp_path / "store" / ".staging" / "pretrained")
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate()
        assert process.returncode == 143, told
        assert "error: pretrained: stopped after step " in " ".join(told.split())
        assert "Traceback" not in told
        world.json(*options, *longer)
        assert 1 <= world.json("show", "pretrained")["produced_by"]["resumed_from"] < 400


def wait_for_a_report(process: "subprocess.Popen[str]", staging: Path) -> None:
    """Wait until training has reported; the test's own time limit is the bound."""
    while not any(path.stat().st_size for path in staging.glob("*/.scratch/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
