"""Trainings on network namespaces as nodes, with the gloo backend: as on one node, and on without a node that is lost."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.many import PATIENCE_SECONDS, Training, assert_equal, losses_alone, trainings
from tests.training.netns import can_make_nodes
from tests.training.one_node import CHECKPOINT_STEPS, NUM_STEPS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not can_make_nodes(), reason="network namespaces take root and iproute2"),
]


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., Training]]:
    with trainings(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    losses = losses_alone(tmp_path_factory.mktemp("alone"))
    assert len(losses) == NUM_STEPS
    return losses


def is_resumed(told: dict[str, Any]) -> bool:
    """From a checkpoint in the middle: which one it is depends on how soon the loss was seen."""
    return told["resumed_from"] in range(CHECKPOINT_STEPS, NUM_STEPS, CHECKPOINT_STEPS)


@pytest.mark.parametrize(
    ("number", "zero", "launcher"), [(2, "zero2", "torchrun"), (4, "zero3", "torchrun"), (2, "zero3", "deepspeed")]
)
def test_nodes_train_as_one_machine_does(train: Any, unbroken: Any, number: int, zero: str, launcher: str) -> None:
    told = train(number, zero, launcher=launcher).end(*[0] * number)
    assert told["num_ranks"] == number
    assert_equal(told["losses"], unbroken)


@pytest.mark.parametrize(("number", "zero", "left"), [(2, "zero2", 1), (4, "zero3", 2)])
def test_a_node_killed_in_the_middle_is_done_without(train: Any, unbroken: Any, number: int, zero: str, left: int) -> None:
    """Of 4 nodes 3 are left, and 3 ranks do not divide the batch of 8: two train, one waits."""
    training = train(number, zero, least=1)
    training.await_step(8)
    training.kill(1)
    told = training.end(0, -signal.SIGKILL, *[0] * (number - 2))
    assert (told["num_ranks"], is_resumed(told)) == (left, True)
    assert_equal(told["losses"], unbroken)
    assert "is gone; the others go on from the newest whole checkpoint" in training.log(0)
    assert f"written by {number} ranks under ZeRO-{zero[-1]}, taken up by {left} ranks" in training.log(0)


def test_a_node_that_loses_its_power_is_missed(train: Any, unbroken: Any) -> None:
    training = train(2, "zero2", least=1)
    training.await_step(8)
    training.net.unplug(1)
    training.processes[0].wait(PATIENCE_SECONDS)
    training.kill(1)
    told = training.end(0, -signal.SIGKILL)
    assert (told["num_ranks"], is_resumed(told)) == (1, True)
    assert_equal(told["losses"], unbroken)


def test_a_node_told_to_end_takes_part_in_a_checkpoint_first(train: Any, unbroken: Any) -> None:
    training = train(2, "zero2", least=1)
    training.await_step(8)
    training.kill(1, signal.SIGTERM)
    told = training.end(0, 1)  # the exit code of the StoppedError that nothing here catches
    assert told["num_ranks"] == 1
    assert told["resumed_from"] >= 8
    assert_equal(told["losses"], unbroken)


def test_a_node_that_comes_back_takes_part_again(train: Any, unbroken: Any) -> None:
    training = train(2, "zero2")  # two at least
    training.await_step(8)
    training.kill(1)
    training.await_that(lambda: "is gone; the others go on" in training.log(0), "the loss")
    training.processes[1] = training.start(1)
    told = training.end(0, 0)
    assert (told["num_ranks"], is_resumed(told)) == (2, True)
    assert_equal(told["losses"], unbroken)


def test_the_node_that_leads_killed_and_started_again_finds_the_others_waiting(train: Any, unbroken: Any) -> None:
    training = train(2, "zero3")
    training.await_step(8)
    training.kill(0)
    training.processes[0].wait()
    training.processes[0] = training.start(0)
    told = training.end(0, 0)
    assert (told["num_ranks"], is_resumed(told)) == (2, True)
    assert_equal(told["losses"], unbroken)


def test_the_node_that_leads_loses_its_machine_and_another_at_its_address_finds_the_others_waiting(
    train: Any, unbroken: Any
) -> None:
    training = train(2, "zero2")
    training.await_step(8)
    training.replace(0)
    told = training.end(0, 0)
    assert (told["num_ranks"], is_resumed(told)) == (2, True)
    assert_equal(told["losses"], unbroken)
    assert "the node that leads is gone; waiting for it" in training.log(1)


def test_a_bucket_feeds_every_node_and_checkpoints_lie_in_a_folder(train: Any, unbroken: Any, tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    told = {"store": f"file://{tmp_path / 'bucket'}", "checkpoints": str(tmp_path / "checkpoints")}
    training = train(2, "zero2", least=1, **told)
    training.await_step(8)
    training.kill(1)
    result = training.end(0, -signal.SIGKILL)
    assert (result["num_ranks"], is_resumed(result)) == (1, True)
    assert_equal(result["losses"], unbroken)
    fetched = {path.name for path in (training.folder / "cache-join").glob("*/blocks-shard/*/*")}
    assert fetched == {"blocks.arrow", "manifest.json"}


def test_a_store_that_a_node_mounts_elsewhere_is_the_same(train: Any, unbroken: Any, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(tmp_path / "run-0" / "store")
    assert_equal(train(2, "zero2", own={1: {"store": str(elsewhere)}}).end(0, 0)["losses"], unbroken)


def test_a_store_that_is_another_is_refused(train: Any, tmp_path: Path) -> None:
    training = train(2, "zero2", own={1: {"store": str(tmp_path / "another")}})
    assert training.processes[0].wait(PATIENCE_SECONDS) == 1
    assert "give all nodes the same folder, as the store or as SEQMILL_CHECKPOINTS" in training.log(0)
