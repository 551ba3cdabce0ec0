"""A server for many users, and machines that work for it: one clone, home folder and cache each, and one bucket for all.

`python -m tests.e2e.hosts --runs 20 --database sqlite` starts so many runs at once, and prints what came of them and when.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.legs import spelled
from flows.recipe import load_recipe
from tests.e2e.operated import Operated, operated, wait_for
from tests.e2e.postgres import Postgres, postgres, postgres_binaries
from tests.store.s3 import BUCKET, CREDENTIALS, s3_server

ROOT = Path(__file__).parents[2]
STAGES = ["archive", "documents", "tokenizer", "tokens", "blocks", "pretrained"]


@dataclass
class Host:
    """A machine of one pool, as far as the server can tell."""

    folder: Path
    pool: str
    limit: int
    environment: dict[str, str]
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        command = [sys.executable, "-c", "from flows.cli import main; main()", "worker", self.pool, "--limit", str(self.limit)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def end(self, number: int = signal.SIGTERM) -> None:
        assert self.process
        self.process.send_signal(number)
        self.process.wait(60)

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints of training under way."""
        return list((self.folder / "cache").glob("*/.staging/pretrained/*/.scratch/checkpoints/*/manifest.json"))


@dataclass
class Many:
    """The server that `seqmill up` started, its database where it is not SQLite, and the machines that work for it."""

    up: Operated
    database: Postgres | None
    hosts: dict[str, Host] = field(default_factory=dict)

    def children(self, run: str) -> list[dict[str, Any]]:
        """The runs that a run has started on pools."""
        body = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}, "sort": "START_TIME_ASC"}
        found: list[dict[str, Any]] = self.up.api("/flow_runs/filter", body)
        return found

    def is_online(self, pool: str) -> bool:
        return any(worker["status"] == "ONLINE" for worker in self.up.api(f"/work_pools/{pool}/workers/filter", {}))

    def start_many(self, number: int) -> list[str]:
        """Runs of stages-flow on the pool cpu, half of one recipe that ends in a model, half of one recipe each."""
        documents = {"shard_bytes": 16384, "validation_fraction": 0.2}  # others than those of the recipe
        recipe = {**spelled(load_recipe(str(self.up.recipe))), "name": "many", "documents": documents}
        deployment = self.up.api("/deployments/name/stages-flow/cpu", method="GET")["id"]
        runs = []
        for i in range(number):
            size, stages = (96, STAGES) if i % 2 else (128 + i, STAGES[:-1])
            parameters = {"recipe": {**recipe, "blocks": {"block_size": size}}, "stages": stages}
            made = self.up.api(f"/deployments/{deployment}/create_flow_run", {"parameters": parameters})
            runs.append(str(made["id"]))
        return runs

    def start_many_over_pools(self, number: int) -> list[str]:
        """Runs of pools-flow, half of one recipe and half of a recipe each; every one ends in a model, on the other pool."""
        documents = {"shard_bytes": 12288, "validation_fraction": 0.2}  # others than those of the recipe
        training = {"num_steps": 4, "checkpoint_steps": 4, "evaluation_steps": 4, "logging_steps": 2}
        runs = []
        for i in range(number):
            overrides = {"documents": documents, "pretrained": training, "blocks": {"block_size": 96 if i % 2 else 128 + i}}
            runs.append(self.up.start("pools-flow", recipe=str(self.up.recipe), overrides=overrides, until="pretrained"))
        return runs

    def built_by(self, run: str) -> list[str]:
        """The references of what a run built itself, as it handed them over."""
        return [row["Reference"] for row in self.handed_over(run) if row["State"] == "built"]

    def handed_over(self, run: str) -> list[dict[str, str]]:
        """The table of references that a run handed over, a row a stage."""
        asked = {"flow_runs": {"id": {"any_": [run]}}, "artifacts": {"key": {"any_": ["references"]}}}
        (table,) = self.up.api("/artifacts/filter", asked)
        rows: list[dict[str, str]] = json.loads(table["data"])
        return rows

    def kill(self, run: str) -> None:
        """SIGKILL to the process that works on a run, and to nothing that it started."""
        mark = f"PREFECT__FLOW_RUN_ID={run}\0".encode()
        (pid,) = [pid for pid in self.up.processes("prefect.") if mark in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(pid, signal.SIGKILL)

    def has_told_all(self, run: str) -> bool:
        """Whether the server knows how every task ended: it is told by events, which come after the run's own end."""
        found = self.up.api("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}, "limit": 200})
        return {task["state"]["name"] for task in found} <= {"Completed", "Cached"}


@contextmanager
def many_hosts(folder: Path, database: Postgres | None, limits: dict[str, int]) -> Iterator[Many]:
    """A server with its database and machines of so many places a pool, that end with the block."""
    with ExitStack() as stack:
        endpoint = stack.enter_context(s3_server(folder / "s3"))
        (folder / "server").mkdir()
        extra = {
            "SEQMILL_STORE": f"s3://{BUCKET}/many-{os.getpid()}",
            "SEQMILL_STORE_ENDPOINT": endpoint,
            "SEQMILL_CACHE": str(folder / "server" / "cache"),
            **CREDENTIALS,
            **({"PREFECT_API_DATABASE_CONNECTION_URL": database.url} if database else {}),
        }
        up = stack.enter_context(operated(folder / "server", extra))
        up.seqmill("deploy", "--pools")
        many = Many(up, database)
        for pool, limit in limits.items():
            many.hosts[pool] = stack.enter_context(_host(folder / pool, pool, limit, up))
        wait_for(lambda: all(many.is_online(pool) for pool in limits))
        yield many


@contextmanager
def _host(folder: Path, pool: str, limit: int, up: Operated) -> Iterator[Host]:
    clone = folder / "clone"
    for name in ("flows", "tasks", "deepspeed_configs", "deployments"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "home").mkdir()
    environment = {
        **{name: value for name, value in up.environment.items() if "DATABASE" not in name},
        "HOME": str(folder / "home"),
        "SEQMILL_CACHE": str(folder / "cache"),
        "PREFECT_API_URL": f"http://127.0.0.1:{up.port}/api",
        "PYTHONPATH": str(clone),
    }
    host = Host(folder, pool, limit, environment)
    host.start()
    try:
        yield host
    finally:
        host.end()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--database", choices=("postgresql", "sqlite"), default="postgresql")
    parser.add_argument("--over-pools", action="store_true", help="runs of pools-flow over cpu and gpu; absent: of cpu alone")
    asked = parser.parse_args()
    binaries = postgres_binaries()
    assert binaries or asked.database == "sqlite", "no PostgreSQL: apt-get install postgresql"
    with ExitStack() as stack:
        database = stack.enter_context(postgres(binaries)) if asked.database == "postgresql" and binaries else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="seqmill-many-")))
        pools = {"cpu": asked.runs, **({"gpu": 2} if asked.over_pools else {})}
        many = stack.enter_context(many_hosts(folder, database, pools))
        print(told(many, asked.runs, asked.database))


def told(many: Many, number: int, database: str) -> str:
    """Start so many runs at once, and say what came of them."""
    began = time.monotonic()
    runs = many.start_many_over_pools(number) if "gpu" in many.hosts else many.start_many(number)
    states = Counter(many.up.end(run) for run in runs)
    seconds = time.monotonic() - began
    built = Counter(ref for run in runs for ref in many.built_by(run))
    twice = sum(times > 1 for times in built.values())
    made = f"{len(built)} artifacts built, {twice} of them twice"
    return f"{number} runs at once on {database}: {seconds:.0f} s, {dict(states)}, {made}"


if __name__ == "__main__":
    main()
