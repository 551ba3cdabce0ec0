"""Start a worker's ranks, pass on what they say, and take them down.

Reads   PLAN.json    all that launcher and worker share
"""

import logging
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from tasks import errors
from tasks.errors import SeqmillError, StoppedError, WorkerError
from tasks.machine import TrainingSettings
from tasks.training.agent import free_port
from tasks.training.lines import FAILURE_PREFIX, METRICS_PREFIX, SEALED_PREFIX, STOPPED_PREFIX, level_of
from tasks.training.nodes.party import Party
from tasks.training.uploads import Uploads

log = logging.getLogger(__name__)

TAIL_LINES = 60  # a traceback of Trainer through DeepSpeed takes about 40
GRACE_SECONDS = 10.0  # between SIGTERM, at which torchrun ends its ranks, and SIGKILL
POLL_SECONDS = 0.5  # how soon an interrupt is seen while the ranks are silent

# torchrun's own report of a rank that died without a word, for instance by the kernel's out-of-memory killer.
TORCHRUN_RANK = re.compile(r"^\s*rank\s*: (\d+)")
TORCHRUN_EXIT = re.compile(r"^\s*exitcode\s*: (-?\d+)")

OnMetrics = Callable[[dict[str, Any]], None]


def run_worker(
    module: str,
    plan_path: Path,
    *,
    num_ranks: int,
    settings: TrainingSettings,
    on_metrics: OnMetrics | None = None,
    label: str = "training",
    stop_path: Path | None = None,
    party: Party | None = None,
    uploads: Uploads | None = None,
) -> None:
    """Run ``python -m module plan_path`` on every rank to its end.

    The ranks stay in this process's care: an exception here, or this process's death, takes them down. ``module`` ends
    with ``run_rank``. A rank that fails with an error of tasks.errors fails here with the same; any other failure is a
    WorkerError. stop_path: the file by which SIGTERM to this process asks the ranks to save and end; StoppedError then.
    party: the nodes whose ranks take part; NodeLostError where one of them is lost, or leaves. uploads: is told of every
    checkpoint that is whole, and given time for the last one where the ranks end before they have trained to their end.
    """
    listener = _Listener(label, on_metrics, uploads.add if uploads else lambda step: None)
    with stop_on_sigterm(stop_path) as asked:
        is_overdue = partial(_is_overdue, asked, settings.stop_seconds)
        try:
            if party:
                _make_ready(party, plan_path, listener, asked)
            process = _started(module, plan_path, num_ranks, settings, party)
            try:
                _hear_out(process, listener, is_overdue, stop_path, party)
                code = _code_of(process, label, settings, is_overdue)
            finally:
                stop(process)
        finally:
            if party:
                party.end()
        if uploads and (code or listener.stopped_step is not None or (party and party.code)):
            uploads.finish(settings.stop_seconds - (time.monotonic() - asked[0] if asked else 0.0))
    if party:
        party.let_go()
        party.judge(label, listener.stopped_step, is_asked=bool(asked), is_told=listener.own_error() is not None)
        code = party.code if party.has_killed and party.code else code or party.code
    if listener.stopped_step is not None:
        raise StoppedError(f"{label}: stopped after step {listener.stopped_step}, whose checkpoint is kept; run again to go on")
    if code != 0 and asked and not listener.failure:  # a signal to the whole group ends ranks that do not listen yet
        raise StoppedError(f"{label}: told to stop, {listener.death(code)} before a checkpoint; run again to go on")
    if code != 0:
        raise listener.error(code)


def _make_ready(party: Party, plan_path: Path, listener: "_Listener", asked: list[float]) -> None:
    """Wait until all nodes have what their ranks read. Raises as ``run_worker`` where one has not, or this one is to stop."""
    if party.make_ready(plan_path, listener.hear, lambda: bool(asked)):
        return
    party.end()
    party.judge(listener.label, None, is_asked=bool(asked))
    if asked:
        raise StoppedError(f"{listener.label}: stopped before its first step; run again to go on")
    raise listener.error(party.code)


def _started(
    module: str, plan_path: Path, num_ranks: int, settings: TrainingSettings, party: Party | None
) -> "subprocess.Popen[bytes]":
    """The launcher of this node's ranks."""
    if party:
        launch = party.go()
        command = agent_command(launch.command(module, plan_path), settings, launch.environment())
    else:
        command = agent_command(launcher_command(module, plan_path, num_ranks, settings), settings)
    log.debug("starting %s", " ".join(command))
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _code_of(process: "subprocess.Popen[bytes]", label: str, settings: TrainingSettings, is_overdue: Callable[[], bool]) -> int:
    """How a launcher ended that was heard out. Raises WorkerError for one that was told to stop, and has not in its time."""
    if is_overdue() and process.poll() is None:
        process.kill()  # it was asked; the ranks die with it: see tasks.machine.die_with_parent
        raise WorkerError(
            f"{label}: told to stop, still running {settings.stop_seconds:g} s later; run again to go on from the last checkpoint"
        )
    return process.wait()


def _hear_out(
    process: "subprocess.Popen[bytes]",
    listener: "_Listener",
    is_overdue: Callable[[], bool],
    stop_path: Path | None,
    party: Party | None,
) -> None:
    """Give every line of the ranks, here and on other nodes, to ``listener``."""
    local = partial(ranks_lines, process, is_overdue)
    assert stop_path or not party
    for line in party.lines(process, local, stop_path) if party and stop_path else local():
        listener.hear(line)


# What asks the runs that other threads than the main one care for.
_askers: list[Callable[[], None]] = []


def stop_all() -> int:
    """Ask every run that another thread than the main one cares for to save and end; returns how many there are."""
    for ask in tuple(_askers):
        ask()
    return len(_askers)


@contextmanager
def stop_on_sigterm(stop_path: Path | None) -> Iterator[list[float]]:
    """While it lasts, SIGTERM writes ``stop_path``; yields the times, by the monotonic clock, at which that was asked.

    Signals are heard by the main thread alone: in another it is ``stop_all`` that asks, or a signal to the ranks themselves.
    """
    asked: list[float] = []

    def ask(*_: Any) -> None:
        assert stop_path
        asked.append(time.monotonic())
        stop_path.touch()

    if stop_path is None:
        yield asked
    elif threading.current_thread() is not threading.main_thread():
        _askers.append(ask)
        try:
            yield asked
        finally:
            _askers.remove(ask)
    else:
        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield asked
        finally:
            signal.signal(signal.SIGTERM, before)


def _is_overdue(asked: list[float], seconds: float) -> bool:
    return bool(asked) and time.monotonic() - asked[0] > seconds


def agent_command(launcher: Sequence[str], settings: TrainingSettings, environment: Sequence[str] = ()) -> list[str]:
    """The process that this one is to start: the agent, which becomes the launcher."""
    threads = str(settings.threads_per_rank)
    return [sys.executable, "-m", "tasks.training.agent", str(os.getpid()), threads, *environment, *launcher]


def launcher_command(module: str, plan_path: Path, num_ranks: int, settings: TrainingSettings) -> list[str]:
    """What to run, as `python -m` takes it: the launcher, its options, the worker and its plan."""
    if num_ranks == 1:
        return [module, str(plan_path)]  # no launcher: it would import torch for nothing, 2 s
    if settings.launcher == "deepspeed":
        # -N for pdsh, which opens the hosts: no host's name before what a rank says, which is read by its beginning.
        several = ["--hostfile", str(settings.hostfile), "--launcher_args=-N"]
        hosts = several if settings.hostfile else ["--num_accelerators", str(num_ranks)]
        port = ["--master_port", str(free_port())]  # its default is the same for every run on a host
        return ["deepspeed.launcher.runner", *hosts, *port, "--no_local_rank", "--module", module, str(plan_path)]
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m", module, str(plan_path)]


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End the launcher and with it the ranks; nothing where it has ended."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # the ranks die with it: see tasks.machine.die_with_parent
            process.wait()
    assert process.stdout
    process.stdout.close()


def ranks_lines(process: "subprocess.Popen[bytes]", is_overdue: Callable[[], bool]) -> Iterator[str]:
    """Every line of the ranks, until the launcher has ended and nothing more comes, or it is overdue."""
    assert process.stdout
    descriptor, pending = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while not is_overdue():
            if not selector.select(POLL_SECONDS):
                if process.poll() is not None:  # a process that outlived its launcher still holds the pipe
                    break
                continue
            data = os.read(descriptor, 1 << 16)
            if not data:
                break
            *whole, pending = (pending + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
    if pending:
        yield pending.decode(errors="replace")


class _Listener:
    """Hears the ranks' lines: metrics go to ``on_metrics``, the others to the log, the last ones are kept."""

    def __init__(self, label: str, on_metrics: OnMetrics | None, on_sealed: Callable[[int], None]) -> None:
        self.label = label
        self.on_sealed = on_sealed
        self.on_metrics = on_metrics
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.failure: dict[str, Any] | None = None
        self.stopped_step: int | None = None
        self.dead_rank: str | None = None
        self.dead_exit: str | None = None

    def hear(self, line: str) -> None:
        if line.startswith(METRICS_PREFIX):
            if self.on_metrics:
                self.on_metrics(orjson.loads(line[len(METRICS_PREFIX) :]))
        elif line.startswith(SEALED_PREFIX):
            self.on_sealed(int(line[len(SEALED_PREFIX) :]))
        elif line.startswith(STOPPED_PREFIX):
            self.stopped_step = int(line[len(STOPPED_PREFIX) :])
        elif line.startswith(FAILURE_PREFIX):
            # The first is the cause: its peers then fail for want of it.
            self.failure = self.failure or orjson.loads(line[len(FAILURE_PREFIX) :])
        elif line.strip():
            if not self.failure:  # what follows a failure is its peers' and torchrun's account of it
                self.tail.append(line)
            if found := TORCHRUN_RANK.match(line):
                self.dead_rank = found[1]
            if found := TORCHRUN_EXIT.match(line):
                self.dead_exit = found[1]
            log.log(level_of(line), "%s", line.rstrip())

    def error(self, code: int) -> SeqmillError:
        """What to raise for a launcher that ended with ``code``."""
        failure = self.failure
        if own := self.own_error():
            return own
        for line in self.tail:
            log.error("%s", line)
        what = f"rank {failure['rank']} failed with {failure['type']}: {failure['message']}" if failure else self.death(code)
        return WorkerError(f"{self.label}: {what}; its last lines are above, the checkpoints before it are kept")

    def own_error(self) -> SeqmillError | None:
        """The error of tasks.errors that a rank failed with."""
        known = _own_error(self.failure["type"]) if self.failure else None
        return known(self.failure["message"]) if known and self.failure else None

    def death(self, code: int) -> str:
        """Who ended without a word, and how."""
        rank = f"rank {self.dead_rank}" if self.dead_rank else "the worker"
        return f"{rank} ended with exit code {self.dead_exit or code}{_killed(self.dead_exit or code)}"


def _own_error(name: str) -> type[SeqmillError] | None:
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, SeqmillError) else None


def _killed(code: str | int) -> str:
    return " (killed: out of memory?)" if int(code) == -signal.SIGKILL else ""
