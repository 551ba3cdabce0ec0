"""Published weights from a hub: a server on loopback that answers as Hugging Face does, at one commit."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import SourceError
from tasks.machine import Machine, Nodes, TrainingSettings
from tasks.store import ArtifactStore, SharedStore, Work
from tasks.training.model import ModelSpec, fetch_weights, hub_commit
from tasks.training.published import PublishedSpec, build_published
from tasks.training.starting_weights import starting_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# A file of one tensor of 2 x 3 numbers, which are not there: nobody reads them.
HEADER = b'{"weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(24)
FILES = {
    "config.json": b'{"model_type": "qwen2", "eos_token_id": 7}',
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"raise SystemExit",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
}
MODEL = ModelSpec(weights="someone/small", weights_revision="main")


class Hub(BaseHTTPRequestHandler):
    """Knows one repository with one commit."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith(f"/api/models/someone/small/tree/{COMMIT}"):
            self.reply(json.dumps([entry(name) for name in FILES]).encode())
        elif path in ("/api/models/someone/small/revision/main", f"/api/models/someone/small/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in FILES]
            self.reply(json.dumps({"id": "someone/small", "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"/someone/small/resolve/{COMMIT}/{name}" and name in FILES:
            etag = hashlib.sha256(FILES[name]).hexdigest()
            self.reply(FILES[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.reply(b"{}", {"X-Error-Code": "RepoNotFound"}, status=404)

    def reply(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def entry(name: str) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(FILES[name]), "oid": hashlib.sha1(FILES[name]).hexdigest()}


@pytest.fixture
def machine() -> Iterator[Machine]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Machine(endpoints={"huggingface": f"http://127.0.0.1:{server.server_port}"})
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_branch_is_keyed_by_the_commit_that_it_stands_for(machine: Machine) -> None:
    assert hub_commit("someone/small", "main", machine) == COMMIT


def test_weights_and_config_are_fetched_and_neither_pickles_nor_code(machine: Machine, tmp_path: Path) -> None:
    folder = fetch_weights(MODEL, COMMIT, machine, tmp_path)
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_published_model_is_fetched_with_its_tokenizer_at_the_commit_that_keys_it(machine: Machine, tmp_path: Path) -> None:
    artifact = build_published(ArtifactStore(tmp_path), machine, PublishedSpec(weights="someone/small"))
    assert artifact.manifest.identity["inputs"] == {"source": COMMIT}
    assert {entry.name for entry in artifact.manifest.files} == {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert artifact.file("generation_config.json").read_bytes() == b'{"eos_token_id":7}'
    assert artifact.stats["num_parameters"] == 6


def test_several_nodes_take_them_from_the_bucket_at_the_commit_that_keys_the_model(machine: Machine, tmp_path: Path) -> None:
    nodes = Nodes(2, 2, "127.0.0.1", 1, secret="x")
    several = replace(machine, training=TrainingSettings(nodes=nodes))
    store = SharedStore(f"file://{tmp_path}/bucket", tmp_path / "cache")
    folder = starting_folder(Work(store, several, tmp_path, COMMIT), ModelSpec(weights="someone/small", weights_revision="moved"))
    (key,) = store.keys("starting-weights")
    assert folder == store.root / "starting-weights" / key
    artifact = store.load("starting-weights", key)
    assert artifact
    assert {entry.name for entry in artifact.manifest.files} == {"config.json", "model.safetensors"}
    assert artifact.file("model.safetensors").read_bytes() == WEIGHTS
    assert artifact.manifest.identity["inputs"] == {"source": COMMIT}


def test_a_name_that_the_hub_does_not_know_is_refused(machine: Machine) -> None:
    with pytest.raises(SourceError, match="someone/gone@main: neither a folder here nor to be had from the hub"):
        hub_commit("someone/gone", "main", machine)


def test_a_hub_that_cannot_be_reached_is_said() -> None:
    with pytest.raises(SourceError, match="someone/small@main: neither a folder here nor to be had from the hub"):
        hub_commit("someone/small", "main", Machine(endpoints={"huggingface": "http://127.0.0.1:9"}))
