"""Real clusters of several worker processes on loopback: Dask's scheduler and workers, Ray's head and nodes.

Each worker has a scratch folder of its own, which another cannot know of. All end with the tests, even by kill -9.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]

from tests.store.s3 import free_ports

from .work import CACHE_VARIABLE

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
START_SECONDS = 90
RAY_FOLDER = Path(f"/tmp/ray-{os.getpid()}")  # short: a socket's path has 107 characters at most

_WITH_TESTS = """
import os, sys
from tasks.machine import die_with_parent
die_with_parent(int(sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""

Kind = Literal["dask", "ray"]


@dataclass
class Cluster:
    """A cluster under test. prefix: what a node's commands stand behind, such as `ip netns exec NAME`; empty on loopback."""

    kind: Kind
    folder: Path
    address: str = ""
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def start_head(self, host: str = "127.0.0.1", prefix: tuple[str, ...] = ()) -> None:
        """The scheduler, which works on nothing itself."""
        (port,) = free_ports(1)
        if self.kind == "dask":
            self.address = f"tcp://{host}:{port}"
            self._start("head", [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", host, "--port", str(port),
                                 "--no-dashboard"], prefix)  # fmt: skip
        else:
            self.address = f"{host}:{port}"
            self._start("head", [SCRIPTS / "ray", "start", "--head", "--block", f"--node-ip-address={host}", f"--port={port}",
                                 f"--temp-dir={RAY_FOLDER}", "--num-cpus=0", "--include-dashboard=false",
                                 "--object-store-memory=80000000", "--disable-usage-stats"], prefix)  # fmt: skip
        wait_for(lambda: answers(self.folder / "head.log", "Scheduler at" if self.kind == "dask" else "Ray runtime started"))

    def start_worker(self, name: str, host: str = "127.0.0.1", prefix: tuple[str, ...] = ()) -> None:
        """One node with one slot and a scratch folder of its own."""
        scratch = self.folder / name
        scratch.mkdir()
        if self.kind == "dask":
            command = [sys.executable, "-m", "distributed.cli.dask_worker", self.address, "--nthreads=1", "--no-dashboard",
                       f"--local-directory={scratch}", f"--name={name}", f"--host={host}", "--memory-limit=0"]  # fmt: skip
        else:
            command = [str(SCRIPTS / "ray"), "start", "--block", f"--address={self.address}", f"--node-ip-address={host}",
                       "--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]  # fmt: skip
        self._start(name, command, prefix, {CACHE_VARIABLE: str(scratch / "cache"), "SEQMILL_CACHE": str(scratch / "cache")})
        # One after the other: Ray's nodes time each other out where they start at once on two cores.
        wait_for(lambda: answers(self.folder / f"{name}.log", "Registered to" if self.kind == "dask" else "Ray runtime started"))

    def begin(self, what: str, prefix: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
        """A run on this cluster, in a process of its own: see one_run."""
        command = [sys.executable, "-m", "tests.cluster.one_run", self.kind, self.address, self.folder, what]
        self._start("run", command, prefix, {CACHE_VARIABLE: str(self.folder / "here")})
        return self.processes["run"]

    def run(self, what: str, prefix: tuple[str, ...] = ()) -> None:
        code = self.begin(what, prefix).wait(300)
        assert code == 0, (self.folder / "run.log").read_text()[-3000:]

    def kill_node(self, name: str) -> None:
        """All of a node's processes, at once."""
        process = self.processes.pop(name)
        with suppress(psutil.NoSuchProcess):
            for one in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        process.kill()
        process.wait()

    def end(self) -> None:
        for name in reversed(list(self.processes)):
            self.kill_node(name)
        shutil.rmtree(RAY_FOLDER, ignore_errors=True)

    def _start(self, name: str, command: Sequence[object], prefix: tuple[str, ...], more: dict[str, str] | None = None) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "OMP_NUM_THREADS": "1"}
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [*prefix, sys.executable, "-c", _WITH_TESTS, str(os.getpid()), *map(str, command)],
                stdout=log, stderr=log, cwd=ROOT, env={**environment, **(more or {})}, start_new_session=True,
            )  # fmt: skip


@contextmanager
def cluster_of(kind: Kind, folder: Path, num_workers: int) -> Iterator[Cluster]:
    """A cluster whose workers are processes here, called node-0 and so on; it ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    one = Cluster(kind, folder)
    try:
        one.start_head()
        for number in range(num_workers):
            one.start_worker(f"node-{number}")
        yield one
    finally:
        one.end()


def answers(log: Path, words: str) -> bool:
    return words in log.read_text(errors="replace")


def wait_for(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + START_SECONDS
    while not is_so():
        assert time.monotonic() < end, "the cluster did not start"
        time.sleep(0.1)
