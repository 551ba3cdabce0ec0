"""A store that is up: `seqmill up` on a free port, `prefect` as a user calls it, and the API read."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from flows.server import free_port
from tests.e2e.world import RECIPE, conversations, corpus

SECRET = "planted-4f1c9e27"

LONG = {"pretrained": {"num_steps": 300, "checkpoint_steps": 50, "evaluation_steps": 300}}


@dataclass
class Operated:
    """The store, its server, and the user's own home folder."""

    folder: Path
    port: int
    extra: Mapping[str, str] = field(default_factory=dict)  # of the environment

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def recipe(self) -> Path:
        return self.folder / "small.yaml"

    @property
    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "SEQMILL_"))}
        chosen = {"STORE": str(self.store), "NUM_RANKS": "2", "NUM_WORKERS": "2"}
        return {
            **inherited,
            "HOME": str(self.folder / "home"),
            "HF_TOKEN": SECRET,
            "SEQMILL_TOKENS": json.dumps({"127.0.0.1": SECRET}),
            **{f"SEQMILL_{name}": value for name, value in chosen.items()},
            **self.extra,
        }

    def run(self, *command: str) -> str:
        """Run a command as the user does, to its end and without a mistake; what it printed."""
        told = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stdout + told.stderr
        return told.stdout

    def seqmill(self, *arguments: str) -> str:
        return self.run(sys.executable, "-c", "from flows.cli import main; main()", *arguments)

    def prefect(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "prefect", *arguments)

    def up(self) -> str:
        return self.seqmill("up", "--port", str(self.port))

    def service(self, name: str) -> int:
        return int(json.loads((self.store / ".prefect" / f"{name}.json").read_text())["pid"])

    def api(self, path: str, body: Any = None, method: str = "POST") -> Any:
        url = f"http://127.0.0.1:{self.port}/api{path}"
        while (answer := httpx.request(method, url, json=body, timeout=60, trust_env=False)).status_code == 503:
            time.sleep(0.3)  # SQLite was locked; Prefect's own clients ask again too
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def start(self, deployment: str, **parameters: Any) -> str:
        """Start a run of a deployment; its id."""
        found = self.api(f"/deployments/name/{deployment}/{deployment}", method="GET")
        return str(self.api(f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"])

    def retry(self, run: str) -> None:
        """What the UI's Retry does."""
        self.api(f"/flow_runs/{run}/set_state", {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True})

    def state(self, run: str) -> str:
        return str(self.api(f"/flow_runs/{run}", method="GET")["state"]["name"])

    def end(self, run: str) -> str:
        """The state in which a run ends."""
        wait_for(lambda: self.state(run) in {"Completed", "Failed", "Crashed", "Cancelled"})
        return self.state(run)

    def tasks(self, run: str) -> dict[str, str]:
        """The states of a run's tasks, by their names."""
        found = self.api("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}, "limit": 200})
        return {task["name"]: task["state"]["name"] for task in found}

    def runs_of(self, flow: str) -> list[dict[str, Any]]:
        """Runs of a flow that somebody started, oldest first."""
        body = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_ASC"}
        return [run for run in self.api("/flow_runs/filter", body) if not run["auto_scheduled"]]

    def processes(self, words: str = "") -> list[int]:
        """Processes that work for this store, and have ``words`` in their command line."""
        found, mark = [], f"SEQMILL_STORE={self.environment['SEQMILL_STORE']}\0".encode()
        for entry in Path("/proc").iterdir():
            try:
                is_ours = mark in (entry / "environ").read_bytes()
                if entry.name.isdigit() and is_ours and words in (entry / "cmdline").read_bytes().decode().replace("\0", " "):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints of training under way."""
        return list((self.store / ".staging" / "pretrained").glob("*/.scratch/checkpoints/*/manifest.json"))


def wait_for(happened: Callable[[], Any]) -> None:
    """Wait until something is to be seen; the test's own time limit is the bound."""
    while not happened():
        time.sleep(0.3)


@contextmanager
def operated(folder: Path, extra: Mapping[str, str] | None = None) -> Iterator[Operated]:
    """Bring a store up, and down at the end."""
    (folder / "home").mkdir()
    for name, data in {
        "corpus": corpus(600),
        "conversations": conversations(0, 200),
        "held-out": conversations(190, 240),
    }.items():
        (folder / name).write_bytes(data)
    recipe = RECIPE.format(origin=folder, corpus_sha256="").replace(", sha256: ", "")
    (folder / "small.yaml").write_text(recipe.replace("{train: {vocab_size: 320}}", f"{{source: {tokenizer(folder)}}}"))
    up = Operated(folder, free_port(), extra or {})
    up.up()
    try:
        yield up
    finally:
        up.seqmill("down")


def tokenizer(folder: Path) -> Path:
    """The folder of a tokenizer trained on the corpus, to be had as a published one is: a changed corpus does not change it."""
    from tasks.corpus.archive import ArchiveSpec, build_archive
    from tasks.corpus.documents import DocumentsSpec, build_documents
    from tasks.corpus.tokenizer import TokenizerSpec, build_tokenizer
    from tasks.machine import Machine
    from tasks.store import ArtifactStore

    store, machine = ArtifactStore(folder / "published"), Machine()
    archive = build_archive(store, machine, ArchiveSpec(url=str(folder / "corpus")))
    documents = build_documents(store, machine, DocumentsSpec(), archive=archive)
    spec = TokenizerSpec.model_validate({"train": {"vocab_size": 320}})
    return build_tokenizer(store, machine, spec, documents=documents).path
