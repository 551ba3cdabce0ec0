"""Trying again after a node is lost, with crews that are made up: nothing here listens or trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import WorkerError
from tasks.machine import Machine, Nodes, TrainingSettings
from tasks.store import ArtifactStore, SharedStore, Work, digest_json
from tasks.training import together
from tasks.training.nodes.nodes import portable
from tasks.training.nodes.party import NodeLostError, Party
from tasks.training.together import checkpoint_root, on_nodes, sweep
from tests.training.small_inputs import InputSpec, build_tokenizer

NODES = Nodes(1, 4, "127.0.0.1", 1)


class FakeCrew:
    """Has one node fewer at every muster, and is alone in the end."""

    def __init__(self, number: int) -> None:
        self.nodes, self.number, self.here = NODES, 0, number

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def muster(self, *_: Any) -> dict[Any, int]:
        self.here = max(1, self.here - 1)
        return {(None, "a", "b")[node]: 2 for node in range(self.here)}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    crew = FakeCrew(4)
    monkeypatch.setattr(together, "crew_of", lambda nodes: crew)
    folder = tmp_path / "pretrained" / "key"
    folder.mkdir(parents=True)
    settings = TrainingSettings(num_ranks=2, nodes=NODES)
    return Work(ArtifactStore(tmp_path), Machine(training=settings), folder, None)


def test_every_loss_is_answered_by_a_party_of_those_that_are_left(work: Work) -> None:
    tried: list[tuple[int | None, bool]] = []

    def train(tried_work: Work, party: Party | None) -> str:
        settings = tried_work.machine.training
        assert settings.nodes is None
        tried.append((settings.num_ranks, party is None))
        if party:
            raise NodeLostError("pretrained: node a is gone")
        return "trained"

    assert on_nodes(work, "pretrained", 8, train) == "trained"
    assert tried == [(6, False), (4, False), (2, True)]


def test_nodes_that_are_lost_again_and_again_without_a_checkpoint_end_the_run(work: Work) -> None:
    tried: list[int] = []

    def train(_: Work, party: Party | None) -> None:
        tried.append(len(tried))
        if len(tried) == 3:
            (checkpoint_root(work) / "checkpoint-5").mkdir(parents=True)  # progress: the count begins anew
        raise NodeLostError("pretrained: node a is gone")

    with pytest.raises(WorkerError, match=r"^pretrained: nodes were lost 5 times in a row without a checkpoint in between; look"):
        on_nodes(work, "pretrained", 8, train)
    assert len(tried) == 3 + 5


def test_one_machine_trains_as_ever(work: Work) -> None:
    alone = replace(work, machine=Machine())
    assert on_nodes(alone, "pretrained", 8, lambda given, party: (given, party)) == (alone, None)


def test_of_a_bucket_each_node_has_a_folder_of_its_own_for_checkpoints(work: Work, tmp_path: Path) -> None:
    shared = replace(work, store=SharedStore(f"file://{tmp_path}/bucket", tmp_path / "cache"))
    party = on_nodes(shared, "pretrained", 8, lambda _, party: party)
    assert party
    assert party.remote
    assert portable(str(checkpoint_root(work) / "checkpoint-5"), party.roots) == "checkpoints:checkpoint-5"


def test_a_folder_that_is_named_for_checkpoints_is_taken_in_place_of_the_bucket(work: Work, tmp_path: Path) -> None:
    training = replace(work.machine.training, checkpoints=tmp_path / "mounted")
    store = SharedStore(f"file://{tmp_path}/bucket", tmp_path / "cache")
    mounted = replace(work, store=store, machine=replace(work.machine, training=training))
    party = on_nodes(mounted, "pretrained", 8, lambda _, party: party)
    assert party
    assert party.remote is None
    assert checkpoint_root(mounted) == tmp_path / "mounted" / "pretrained" / "key"


def test_checkpoints_of_what_is_built_are_swept_and_no_others(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    built = build_tokenizer(store, Machine(), InputSpec())
    root = tmp_path / "checkpoints"
    kept = [root / "tokenizer" / digest_json("another"), root / "mine" / "notes"]
    for folder in (root / "tokenizer" / built.key, *kept):
        folder.mkdir(parents=True)
    sweep(root, store)
    assert sorted(path for path in root.glob("*/*")) == sorted(kept)
