"""Published weights to start from: where the nodes of a training find them."""

import logging
import shutil
from pathlib import Path

import pytest

from tasks.errors import SourceError
from tasks.machine import Machine, Nodes, TrainingSettings
from tasks.store import ArtifactStore, SharedStore, Work
from tasks.training.arrivals import Arrivals
from tasks.training.model import ModelSpec, identify_weights
from tasks.training.starting_weights import starting_folder

FILES = {"config.json": b"{}", "model.safetensors": b"numbers", "tokenizer.json": b"{}", "modeling.py": b"raise SystemExit"}
READ = ["config.json", "model.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    for name, data in FILES.items():
        (made / name).write_bytes(data)
    return made


def work_of(store: ArtifactStore, model: ModelSpec, tmp_path: Path, most_nodes: int) -> Work:
    nodes = Nodes(1, most_nodes, "127.0.0.1", 1, secret="x")
    machine, staging = Machine(training=TrainingSettings(nodes=nodes)), tmp_path / "staging"
    staging.mkdir(exist_ok=True)
    return Work(store, machine, staging, identify_weights(model, store, machine))


def bucket(tmp_path: Path, node: int = 0) -> SharedStore:
    return SharedStore(f"file://{tmp_path}/bucket", tmp_path / f"cache-{node}")


def test_nodes_whose_store_is_a_bucket_find_them_there(folder: Path, tmp_path: Path) -> None:
    model, store = ModelSpec(weights=str(folder)), bucket(tmp_path)
    found = starting_folder(work_of(store, model, tmp_path, 2), model)
    shutil.rmtree(folder)  # of the node that leads alone
    other = bucket(tmp_path, 1)
    there = other.root / found.relative_to(store.root)
    plan = {"model": {"folder": str(there)}, "validation_files": []}
    Arrivals(other, plan, range(1, 2))
    assert sorted(path.name for path in there.iterdir() if path.name in FILES) == READ
    assert (there / "model.safetensors").read_bytes() == b"numbers"


@pytest.mark.parametrize("is_bucket", [True, False])
def test_one_node_and_nodes_that_mount_the_store_take_them_where_they_are(folder: Path, tmp_path: Path, is_bucket: bool) -> None:
    model = ModelSpec(weights=str(folder))
    store = bucket(tmp_path) if is_bucket else ArtifactStore(tmp_path / "store")
    assert starting_folder(work_of(store, model, tmp_path, 1 if is_bucket else 2), model) == folder


def test_weights_that_changed_since_they_gave_the_model_its_key_are_refused(folder: Path, tmp_path: Path) -> None:
    model, store = ModelSpec(weights=str(folder)), bucket(tmp_path)
    work = work_of(store, model, tmp_path, 2)
    (folder / "model.safetensors").write_bytes(b"others")
    with pytest.raises(SourceError, match=r"its files changed while they were read; let nothing write them and run again"):
        starting_folder(work, model)


def test_they_are_put_into_the_bucket_once(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ModelSpec(weights=str(folder))
    with caplog.at_level(logging.INFO):
        for node in (0, 1):
            starting_folder(work_of(bucket(tmp_path, node), model, tmp_path, 2), model)
    assert caplog.text.count("starting-weights/") == 1
    assert len(bucket(tmp_path).keys("starting-weights")) == 1
