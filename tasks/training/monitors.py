"""Monitors: what the ranks report, written as a training run goes, for the tools that people watch it with.

Writes  <store>/.monitoring/<kind>/<key>/metrics.jsonl   one JSON object a report
        <store>/.monitoring/<kind>/<key>/tensorboard/    event files: `tensorboard --logdir <store>/.monitoring`
        <store>/.monitoring/<kind>/<key>/swanlab/        an offline run: `swanlab sync` or `swanlab watch` shows it

None is needed and none enters a key. One that fails says so once, is left out from there on, and never stops training.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import orjson

from tasks.errors import SettingsError
from tasks.training.metrics import MetricsFile

log = logging.getLogger(__name__)

FOLDER = ".monitoring"
CLOSE_SECONDS = 20.0  # for SwanLab to write what it holds

# What each needs besides seqmill itself; the extra of the same name brings it.
NEEDS = {"jsonl": None, "tensorboard": "tensorboard", "swanlab": "swanlab"}

# What is no metric: it tells where a report stands.
NOT_PLOTTED = ("step", "num_steps")


@dataclass(frozen=True)
class Run:
    """The training run that is watched."""

    folder: Path
    name: str
    step: int  # where it begins: 0, or the step of the checkpoint it goes on from

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "step": self.step}


class Monitor(Protocol):
    """Hears every report of a run."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """A file of reports, of which none is of a step that was trained again."""

    def __init__(self, run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        self.write = MetricsFile(run.folder / "metrics.jsonl", run.step).append

    def close(self) -> None:
        """Every report is in the file by now."""


class TensorBoard:
    """An event file a try; what an earlier one wrote of steps that are trained again is marked as void."""

    def __init__(self, run: Run) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.protocol, self.summaries = event_pb2, summary_pb2
        folder = run.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self.writer = EventFileWriter(str(folder))
        if run.step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self.writer.add_event(event_pb2.Event(step=run.step + 1, session_log=start))

    def write(self, row: dict[str, Any]) -> None:
        values = [self.summaries.Summary.Value(tag=name, simple_value=value) for name, value in plotted(row).items()]
        self.writer.add_event(self.protocol.Event(step=row["step"], summary=self.summaries.Summary(value=values)))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class SwanLab:
    """SwanLab in a process of its own: it takes over the output and the exceptions of the one that it runs in."""

    def __init__(self, run: Run) -> None:
        folder = run.folder / "swanlab"
        folder.mkdir(parents=True, exist_ok=True)
        self.log = (folder / "seqmill.log").open("ab")
        program = Path(__file__).with_name("swanlab_process.py")
        command = [sys.executable, str(program)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, cwd=folder)
        assert self.process.stdin
        self.pipe = self.process.stdin.fileno()
        os.set_blocking(self.pipe, False)  # a process that hangs must not hold training
        self._send(run.settings)

    def write(self, row: dict[str, Any]) -> None:
        self._send({"step": row["step"], "values": plotted(row)})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            os.write(self.pipe, orjson.dumps(message) + b"\n")  # whole or not at all: shorter than PIPE_BUF, 4,096 bytes
        except OSError as error:
            self.process.kill()
            raise OSError(f"its process reads no more ({error.strerror}); see {self.log.name}") from error

    def close(self) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.close()
            code = self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        finally:
            self.log.close()
        if code:
            raise OSError(f"ended with exit code {code}; read {self.log.name}")


MONITORS: dict[str, Callable[[Run], Monitor]] = {"jsonl": JsonLines, "tensorboard": TensorBoard, "swanlab": SwanLab}


def check_monitors(names: Sequence[str]) -> None:
    """Raise SettingsError for a monitor that does not exist, or whose package is not installed."""
    for name in names:
        if name not in MONITORS:
            raise SettingsError(f"settings: monitors: no monitor {name!r}; there are {', '.join(MONITORS)}")
        if (package := NEEDS[name]) and not find_spec(package):
            raise SettingsError(f"settings: monitors: {package} is not installed; pip install 'seqmill[{name}]', or leave it out")


@contextmanager
def watched(names: Sequence[str], run: Run) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the monitors of these names for a run; yields what hands them a report."""
    opened: dict[str, Monitor] = {}
    for name in names:
        with _said_once(name, opened):
            opened[name] = MONITORS[name](run)

    def hear(row: dict[str, Any]) -> None:
        for name, monitor in list(opened.items()):
            with _said_once(name, opened):
                monitor.write(row)

    try:
        yield hear
    finally:
        for name, monitor in list(opened.items()):
            with _said_once(name, opened):
                monitor.close()


@contextmanager
def _said_once(name: str, opened: dict[str, Monitor]) -> Iterator[None]:
    """Whatever fails in a monitor is told, and the monitor is left out."""
    try:
        yield
    except Exception as error:
        opened.pop(name, None)
        log.warning("monitor %s: %s: %s; training goes on without it", name, type(error).__name__, error)


def plotted(row: dict[str, Any]) -> dict[str, float]:
    """A report's metrics by name."""
    return {name: float(value) for name, value in row.items() if name not in NOT_PLOTTED}
