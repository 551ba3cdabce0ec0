"""What a node fetches of a shared store for a training: what its ranks need, in the order in which they need it."""

import queue
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import SeqmillError
from tasks.machine import Machine
from tasks.store import ArtifactStore, SharedStore
from tasks.training.arrivals import Arrivals, first_needed
from tasks.training.order import permutation
from tasks.training.rows import Rows
from tasks.training.run import count_rows
from tests.training.small_inputs import InputSpec, build_blocks


def plan_of(files: list[str], counts: list[int], num_ranks: int = 2, num_steps: int = 3, **fields: Any) -> dict[str, Any]:
    """Of steps with one row a rank."""
    return {
        "train_files": files,
        "train_counts": counts,
        "validation_files": [],
        "model": {"folder": None},
        "batch": {"num_ranks": num_ranks, "micro_batch_size": 1, "accumulation": 1},
        "optimization": {"seed": 5},
        "num_steps": num_steps,
        "resume_from": None,
        **fields,
    }


def test_a_nodes_files_come_in_the_order_of_its_own_ranks_need() -> None:
    files = [str(number) for number in range(12)]
    order = [str(row) for row in permutation(12, 5, 0)]  # a file a row
    assert list(first_needed(plan_of(files, [1] * 12), [0])) == order[0:6:2]
    assert list(first_needed(plan_of(files, [1] * 12), [1])) == order[1:6:2]
    assert list(first_needed(plan_of(files, [1] * 12), [0, 1])) == order[0:6]


def test_a_run_taken_up_again_fetches_nothing_of_the_steps_before() -> None:
    order = [str(row) for row in permutation(12, 5, 0)]
    plan = plan_of([str(number) for number in range(12)], [1] * 12, resume_from="/checkpoints/checkpoint-2")
    assert list(first_needed(plan, [0, 1])) == order[4:6]


def test_a_file_is_fetched_once_and_one_without_a_row_never() -> None:
    plan = plan_of(["a", "none", "b"], [3, 0, 3], num_steps=6)
    assert sorted(first_needed(plan, [0, 1])) == ["a", "b"]


@pytest.fixture
def stores(tmp_path: Path) -> tuple[SharedStore, SharedStore]:
    """A bucket as two nodes open it."""
    (tmp_path / "bucket").mkdir()
    url = f"file://{tmp_path / 'bucket'}"
    return SharedStore(url, tmp_path / "leading"), SharedStore(url, tmp_path / "joining")


def test_rows_come_from_a_bucket_while_they_are_read(stores: tuple[SharedStore, SharedStore]) -> None:
    leading, joining = stores
    shards = build_blocks(leading, Machine(), InputSpec())
    theirs = [shards.shard_file(shard, "blocks.arrow") for shard in shards.shards("train")]
    ours = [str(joining.root / path.relative_to(leading.root)) for path in theirs]
    counts = [count_rows(path) for path in theirs]
    with Arrivals(joining, plan_of(ours, counts, num_steps=sum(counts)), range(2)) as arrivals:
        assert arrivals.is_needed
        arrivals.start(lambda error: pytest.fail(str(error)))
        read = [row["input_ids"].tolist() for row in Rows(ours, counts, is_arriving=True)]
    assert read == [row["input_ids"].tolist() for row in Rows([str(path) for path in theirs])]


def test_a_shard_that_no_store_has_is_told_of(stores: tuple[SharedStore, SharedStore]) -> None:
    missing = str(stores[1].root / "blocks-shard" / ("0" * 64) / "blocks.arrow")
    failures: queue.Queue[SeqmillError] = queue.Queue()
    with Arrivals(stores[1], plan_of([missing], [2]), range(2)) as arrivals:
        arrivals.start(failures.put)
        assert "missing; give all nodes the same SEQMILL_STORE" in str(failures.get(timeout=20))


def test_files_of_a_folder_are_used_where_they_lie(tmp_path: Path) -> None:
    assert not Arrivals(ArtifactStore(tmp_path), plan_of(["/elsewhere"], [1]), range(1)).is_needed
