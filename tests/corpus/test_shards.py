from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tasks.corpus.shards import ShardWork, build_shards, load_shard
from tasks.errors import StoreError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Built, Digest, ShardEntry, Spec, Work, stage


class NumberSpec(Spec):
    number: int


@stage("number", revision=1)
def build_number(work: Work, spec: NumberSpec) -> Built:
    return Built(stats={"number": spec.number})


def test_only_shards_that_the_store_lacks_are_handed_out_and_the_order_is_kept(store: ArtifactStore) -> None:
    def run_here(function: Callable[[Any], Any], items: Sequence[Any], label: str) -> list[Any]:
        handed_out.append([item.spec.number for item in items])
        return [function(item) for item in items]

    def build(item: ShardWork) -> Artifact:
        assert isinstance(item.spec, NumberSpec)
        return build_number(store, Machine(), item.spec)

    handed_out: list[list[int]] = []
    work = Work(store, Machine(runner=run_here), store.root, None)
    for numbers in ([2, 4], [1, 2, 3, 4, 5], [5, 1]):
        artifacts = build_shards(work, build_number, build, [ShardWork(NumberSpec(number=n), {}) for n in numbers], "numbers")
        assert [artifact.stats["number"] for artifact in artifacts] == numbers
    assert handed_out == [[2, 4], [1, 3, 5]]


def test_a_shard_that_the_store_lost_is_told(store: ArtifactStore) -> None:
    nothing = Digest("0" * 64)
    entry = ShardEntry(name="train/00000", kind="documents-shard", key=nothing, content=nothing, num_bytes=1)
    with pytest.raises(StoreError, match=r"shard train/00000 \(documents-shard/000000000000\) is missing; run again"):
        load_shard(store, entry)
