"""Runs that a person started: noted while their process is there, and told as Crashed once it is gone."""

import subprocess
import sys
from pathlib import Path
from uuid import UUID

from flows.underway import RUNS, gone

RUN = UUID("6f9619ff-8b86-4d01-b42d-00cf4fc964ff")
HOLDS = f"""
import sys
from pathlib import Path
from uuid import UUID
from flows.underway import hold
hold(Path(sys.argv[1]), UUID("{RUN}"))
print("held", flush=True)
sys.stdin.read()
"""


def holder(folder: Path) -> "subprocess.Popen[str]":
    """A process that works on the run."""
    command = [sys.executable, "-c", HOLDS, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_is_gone_once_its_process_was_killed_and_not_before(tmp_path: Path) -> None:
    process = holder(tmp_path)
    assert gone(tmp_path) == []
    process.kill()
    process.communicate()
    assert gone(tmp_path) == [tmp_path / RUNS / str(RUN)]


def test_a_run_of_another_host_is_left_to_that_host(tmp_path: Path) -> None:
    (tmp_path / RUNS).mkdir()
    (tmp_path / RUNS / str(RUN)).write_text("elsewhere")
    assert gone(tmp_path) == []


def test_a_store_without_runs_has_none_that_are_gone(tmp_path: Path) -> None:
    assert gone(tmp_path) == []
