"""What a node fetches of a shared store for a training: what its ranks need, in the order in which they need it."""

import queue
from pathlib import Path
from typing import Any

import orjson
import pytest

from tasks.errors import SeqmillError, StoreError
from tasks.machine import Machine
from tasks.store import ArtifactStore, SharedStore
from tasks.training.arrivals import Arrivals, first_needed
from tasks.training.nodes.nodes import STORE, localized, portable
from tasks.training.order import permutation
from tasks.training.rows import Rows
from tasks.training.run import count_rows
from tests.store.shared_build import WordSpec, build_drawn
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


@pytest.mark.parametrize("has_old", ["leading", "joining", "both", "none"])
def test_what_was_built_twice_is_the_same_build_on_every_node(stores: tuple[SharedStore, SharedStore], has_old: str) -> None:
    leading, joining = stores
    old = build_drawn(SharedStore(leading.address, leading.root.parent.parent / "third"), Machine(), WordSpec(word="a"))
    for store, name in ((leading, "leading"), (joining, "joining")):
        if has_old in (name, "both"):
            store.resolve(old.ref).file("a")
    leading.set_aside(old.kind, old.key, "for this test")
    new = build_drawn(SharedStore(leading.address, leading.root.parent.parent / "fourth"), Machine(), WordSpec(word="a"))
    theirs = leading.resolve(new.ref)
    plan = plan_of([str(theirs.file("b"))], [1], validation_files=[str(theirs.file("a"))], model={"folder": str(theirs.path)})
    told = orjson.loads(orjson.dumps(portable(plan, {STORE: leading.root}, leading.cache)))
    ours = localized(told, {STORE: joining.root}, joining.cache)
    with Arrivals(joining, ours, range(2)) as arrivals:
        arrivals.fetch(ours["train_files"][0])
    data = new.file("a").read_bytes()
    assert data != old.file("a").read_bytes()
    for path in (*ours["train_files"], *ours["validation_files"], f"{ours['model']['folder']}/a"):
        assert Path(path).is_relative_to(joining.root)
        assert Path(path).read_bytes() == data


def test_a_build_that_only_the_node_that_leads_has_is_told_of(stores: tuple[SharedStore, SharedStore]) -> None:
    leading, joining = stores
    old = build_drawn(leading, Machine(), WordSpec(word="a"))
    told = portable({"files": [str(old.file("a"))]}, {STORE: leading.root}, leading.cache)
    joining.set_aside(old.kind, old.key, "for this test")
    build_drawn(SharedStore(leading.address, leading.root.parent.parent / "third"), Machine(), WordSpec(word="a"))
    files = localized(told, {STORE: joining.root}, joining.cache)["files"]
    with pytest.raises(StoreError, match="another build of it is there than the node that leads has"):
        Arrivals(joining, plan_of([], [], validation_files=files), range(2))


def test_files_of_a_folder_are_used_where_they_lie(tmp_path: Path) -> None:
    assert not Arrivals(ArtifactStore(tmp_path), plan_of(["/elsewhere"], [1]), range(1)).is_needed
