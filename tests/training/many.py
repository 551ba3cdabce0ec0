"""A training on network namespaces as nodes, in processes of their own: see tests.training.one_node."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.training.netns import Nodes, nodes

PATIENCE_SECONDS = 500
# Of losses near 4, over all changes of ranks and stage in fp32: see docs/decisions/0008.
NOISE = 1e-5


class Training:
    """A training on several nodes, all of whose stores are one folder. own: what a node is told beside that, by its number."""

    def __init__(self, net: Nodes, folder: Path, zero: str, own: dict[int, Any] | None = None, **told: Any) -> None:
        self.net, self.folder = net, folder
        folder.mkdir()
        number = len(net.names)
        settings = {"host": net.address(0), "port": 29400, "least": number, "most": number, "settle": 1, "ranks": 1, "zero": zero}
        self.told = {**settings, **told}
        self.processes = {node: self.start(node, **(own or {}).get(node, {})) for node in range(number)}

    def start(self, node: int, **told: Any) -> "subprocess.Popen[bytes]":
        """Node 0 leads, the others join it."""
        what = "join" if node else "lead"
        arguments = ["-m", "tests.training.one_node", what, str(self.folder), json.dumps({**self.told, **told})]
        return self.net.start(node, arguments, self.folder / f"{node}.log")

    def await_step(self, step: int) -> None:
        """Wait until node 0 has heard of this step."""
        path = self.folder / "steps"
        self.await_that(lambda: path.exists() and str(step) in path.read_text().split(), f"step {step}")

    def await_that(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            is_here = time.monotonic() < deadline and self.processes[0].poll() in (None, 0)
            assert is_here, f"{what}: not reached; {self.log(0)[-3000:]}"
            time.sleep(0.05)

    def replace(self, node: int, **told: Any) -> None:
        """A node's machine loses its power; another takes its address, and starts what that one ran."""
        self.net.unplug(node)
        self.kill(node)
        self.processes[node].wait(PATIENCE_SECONDS)
        self.net.replace(node)
        self.processes[node] = self.start(node, **told)

    def kill(self, node: int, number: int = signal.SIGKILL) -> None:
        self.processes[node].send_signal(number)

    def log(self, node: int) -> str:
        return (self.folder / f"{node}.log").read_text()

    def end(self, *codes: int) -> dict[str, Any]:
        """Wait until all have ended, with these exit codes; what node 0 tells."""
        found = tuple(process.wait(PATIENCE_SECONDS) for process in self.processes.values())
        assert found == codes, self.log(0)[-5000:]
        told: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return told

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@contextmanager
def trainings(folder: Path) -> Iterator[Callable[..., Training]]:
    """What starts trainings, each on nodes of its own; all of it ends with the block."""
    started: list[Training] = []
    nets: list[Any] = []

    def start(number: int, zero: str, **told: Any) -> Training:
        nets.append(nodes(number))
        started.append(Training(nets[-1].__enter__(), folder / f"run-{len(started)}", zero, **told))
        return started[-1]

    try:
        yield start
    finally:
        for training in started:
            training.close()
        for net in nets:
            net.__exit__(None, None, None)


def losses_alone(folder: Path, **told: Any) -> list[tuple[int, float]]:
    """The losses of one rank on one machine."""
    command = ["-m", "tests.training.one_node", "lead", str(folder), json.dumps({"ranks": 1, "zero": "zero2", **told})]
    subprocess.run([sys.executable, *command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    losses: list[tuple[int, float]] = json.loads((folder / "result.json").read_text())["losses"]
    return losses


def assert_equal(losses: list[Any], expected: list[Any]) -> None:
    assert [step for step, _ in losses] == [step for step, _ in expected] == list(range(1, len(expected) + 1))
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in expected], abs=NOISE, rel=0)
