"""One run of a recipe at a time."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from flows.deployed import _is_of_prefect
from flows.turn import turn

HOLD = """
import signal, sys
from contextlib import nullcontext
from pathlib import Path
from flows.turn import turn
with turn(Path(sys.argv[1]), "demo", "the first", nullcontext):
    print("held", flush=True)
    signal.pause()
"""


def refused(holder: str) -> AbstractContextManager[None]:
    raise AssertionError(f"waits for {holder}")


def test_a_newer_run_waits_for_the_one_under_way_and_says_for_which(tmp_path: Path) -> None:
    events, waits = list[str](), threading.Event()

    @contextmanager
    def waiting(holder: str) -> Iterator[None]:
        events.append(f"waits for {holder}")
        waits.set()
        yield
        events.append("waits no more")

    def run() -> None:
        with turn(tmp_path, "demo", "the second", waiting):
            events.append("works")

    with turn(tmp_path, "demo", "the first", refused):
        thread = threading.Thread(target=run)
        thread.start()
        assert waits.wait(10)
        events.append("the first ends")
    thread.join()
    assert events == ["waits for the first", "the first ends", "waits no more", "works"]


def test_runs_of_other_recipes_do_not_wait(tmp_path: Path) -> None:
    with turn(tmp_path, "demo", "a", refused), turn(tmp_path, "other", "b", refused):
        pass


def test_a_turn_dies_with_its_holder(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(AssertionError, match="waits for the first"), turn(tmp_path, "demo", "the second", refused):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with turn(tmp_path, "demo", "the second", refused):
        pass


def test_what_takes_a_dead_workers_children_is_no_worker() -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    other = subprocess.Popen(["cat"], **pipes)
    worker = subprocess.Popen(["cat", "-", "prefect"], **pipes)
    try:
        for process in (other, worker):  # one that answers has its command line; right behind the fork it has none yet
            assert process.stdin
            assert process.stdout
            process.stdin.write(b"there\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"there\n"
        assert not _is_of_prefect(other.pid)
        assert _is_of_prefect(worker.pid)
        assert _is_of_prefect(os.getpid()) == (b"prefect" in Path("/proc/self/cmdline").read_bytes())
    finally:
        other.communicate()
        worker.communicate()
