"""Launching: with workers that import nothing heavy, so that a launch takes a fraction of a second."""

import json
import logging
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import RecipeError, StoppedError, WorkerError
from tasks.machine import TrainingSettings
from tasks.training.launch import launcher_command, run_worker
from tasks.training.lines import level_of

WORKER = """
import logging, os, signal, time
from tasks.errors import RecipeError
from tasks.training.rank import report_metrics, run_rank, speak

def work(plan):
    if plan["do"] == "metrics":
        report_metrics({"step": 1, "loss": 2.5, "threads": os.environ["OMP_NUM_THREADS"]})
        logging.getLogger("worker").info("read 3 blocks")
    if plan["do"] == "fail":
        raise ValueError("no such\\ncolumn")
    if plan["do"] == "refuse":
        raise RecipeError("adapter: no module is named q; name another")
    if plan["do"] == "die":
        os.kill(os.getpid(), 9)
    if plan["do"] == "be deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if plan["do"] in ("wait", "be deaf"):
        report_metrics({"pid": os.getpid()})
        time.sleep(100)

if __name__ == "__main__":
    run_rank(work)
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "fake_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))

    def run(do: str, stop_seconds: float = 600, **options: Any) -> None:
        plan = tmp_path / "plan.json"
        plan.write_text(json.dumps({"do": do}))
        run_worker(
            "fake_worker", plan, num_ranks=1, settings=TrainingSettings(stop_seconds=stop_seconds), label="pretrained", **options
        )

    return run


def test_metrics_reach_the_caller_and_log_lines_keep_their_level(launch: Any, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[dict[str, Any]] = []
    with caplog.at_level(logging.INFO):
        launch("metrics", on_metrics=heard.append)
    assert heard == [{"step": 1, "loss": 2.5, "threads": "1"}]
    assert ("INFO", "INFO:worker: read 3 blocks") in [(record.levelname, record.message) for record in caplog.records]


def test_a_failing_rank_is_named_in_one_line_with_its_error(launch: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(WorkerError, match=r"^pretrained: rank 0 failed with ValueError: no such column; [^\n]*$"):
        launch("fail")
    assert "Traceback (most recent call last):" in [r.message for r in caplog.records if r.levelname == "ERROR"]


def test_an_error_of_ours_keeps_its_class_and_message(launch: Any) -> None:
    with pytest.raises(RecipeError, match=r"^adapter: no module is named q; name another$"):
        launch("refuse")


def test_a_killed_rank_is_reported_with_its_signal(launch: Any) -> None:
    with pytest.raises(WorkerError, match=r"ended with exit code -9 \(killed: out of memory\?\)"):
        launch("die")


def test_an_interrupt_takes_the_ranks_down(launch: Any) -> None:
    pids: list[int] = []

    def interrupt(metrics: dict[str, Any]) -> None:
        pids.append(metrics["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch("wait", on_metrics=interrupt)
    assert not is_alive(pids[0])


def test_ranks_that_are_deaf_to_a_stop_are_taken_down_when_their_time_is_over(tmp_path: Path, launch: Any) -> None:
    pids: list[int] = []

    def tell(metrics: dict[str, Any]) -> None:
        pids.append(metrics["pid"])
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(WorkerError, match=r"^pretrained: told to stop, still running 0 s later; run again to go on"):
        launch("be deaf", stop_seconds=0, on_metrics=tell, stop_path=tmp_path / "stop")
    assert not is_alive(pids[0])


def test_ranks_that_end_by_the_signal_that_asks_before_they_listen_are_a_stop_and_no_fault(tmp_path: Path, launch: Any) -> None:
    def tell(metrics: dict[str, Any]) -> None:  # as Slurm does: to every process of the run
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(metrics["pid"], signal.SIGTERM)

    with pytest.raises(StoppedError, match=r"^pretrained: told to stop, the worker ended with exit code -15 before a checkpoint"):
        launch("wait", on_metrics=tell, stop_path=tmp_path / "stop")


def test_ranks_die_with_a_launcher_killed_by_kill_9(tmp_path: Path, launch: Any) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"do": "wait"}))
    code = (
        "from pathlib import Path; from tasks.machine import TrainingSettings; from tasks.training.launch import run_worker\n"
        f"run_worker('fake_worker', Path({str(plan)!r}), num_ranks=1, settings=TrainingSettings(),"
        " on_metrics=lambda m: print(m['pid'], flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    rank = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    ended, _, _ = select.select([rank], [], [], 20)
    os.close(rank)
    assert ended == [rank]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_more_ranks_than_one_start_through_torchrun() -> None:
    command = launcher_command("tasks.training.worker", Path("plan.json"), 2, TrainingSettings())
    assert command == [
        *("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "tasks.training.worker", "plan.json"),
    ]


def test_the_deepspeed_launcher_is_given_the_hostfile() -> None:
    settings = TrainingSettings(launcher="deepspeed", hostfile=Path("hosts"))
    command = launcher_command("tasks.training.worker", Path("plan.json"), 4, settings)
    assert command[:5] == ["deepspeed.launcher.runner", "--hostfile", "hosts", "--launcher_args=-N", "--master_port"]
    assert command[6:] == ["--no_local_rank", "--module", "tasks.training.worker", "plan.json"]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_one_rank_needs_no_launcher_and_stays_on_this_host(launcher: Any) -> None:
    settings = TrainingSettings(launcher=launcher, hostfile=Path("hosts"))
    assert launcher_command("tasks.training.evaluator", Path("plan.json"), 1, settings) == [
        "tasks.training.evaluator",
        "plan.json",
    ]


def test_a_rank_dies_with_an_agent_that_is_not_its_parent(tmp_path: Path, launch: Any) -> None:
    (tmp_path / "plan.json").write_text('{"do": "wait"}')
    agent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    environment = {**os.environ, "SEQMILL_AGENT": str(agent.pid)}
    command = [sys.executable, "-m", "fake_worker", str(tmp_path / "plan.json")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as rank:
        assert rank.stdout
        assert rank.stdout.readline().startswith(b"@metrics ")
        agent.kill()
        agent.communicate()
        assert rank.wait(20) == 1


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("INFO:tasks.training.worker: 3 blocks", logging.INFO),
        ("[WARNING|trainer.py:33] 2026-01-01 >> slow", logging.WARNING),
        ("[2026-01-01 10:00:00,123] [ERROR] [runner.py:1] lost", logging.ERROR),
        ("loading weights: 100%", logging.DEBUG),
    ],
)
def test_a_line_has_the_level_that_it_says(line: str, level: int) -> None:
    assert level_of(line) == level
