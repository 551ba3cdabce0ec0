"""Builds killed at moments drawn from a seed, in every stage, end as one that nobody kills: content, counts, nothing twice."""

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.corpus import Sources
from tests.faults.events import Kill
from tests.faults.harness import Broken, Unbroken, finished
from tests.faults.kills import KINDS, published, run_cases

SEED = 21
NUM_CASES = 9  # about 44 kills; `make faults KILLS=2000 SEED=7` does more


@pytest.mark.timeout(900)  # 33 s on two idle cores, four times that beside other work
def test_a_build_killed_at_any_moment_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    with published(tmp_path / "sources") as sources:
        cases = run_cases(SEED, range(NUM_CASES), tmp_path, sources)
    assert "\n\n".join(case.told(SEED) for case in cases if case.problems) == ""
    hits = Counter(kind for case in cases for kind in case.hits)
    assert hits.total() >= 35
    # Which shards are finished at a kill hangs on the clock, and so what the next kill can be aimed at.
    assert len([kind for kind in KINDS if not hits[kind]]) <= 1


@pytest.mark.parametrize("kind", ["documents-shard", "tokens-shard", "blocks-shard"])
def test_a_build_killed_among_its_shards_keeps_those_and_makes_the_others(
    kind: str, tmp_path: Path, sources: Sources, unbroken: Unbroken
) -> None:
    commits = [event for event in unbroken.events if re.fullmatch(rf"rename \.staging/{kind}/[0-9a-f]{{12}} 1", event)]
    broken = Broken(tmp_path, sources)
    broken.run(Kill(commits[len(commits) // 2], "tree"))
    kept = [ref for ref in finished(broken.root) if ref.startswith(f"{kind}/")]
    broken.finish(unbroken)
    assert broken.hits == [kind]
    assert 0 < len(kept) < len(commits)
    assert broken.problems == []


def test_a_file_torn_at_a_byte_is_written_anew(tmp_path: Path, sources: Sources, unbroken: Unbroken) -> None:
    begun = next(event for event in unbroken.events if event.startswith("mkdir .staging/tokens-shard/"))
    broken = Broken(tmp_path, sources)
    broken.run(Kill(begun, num_bytes=12_345), "threads")
    torn = [path.stat().st_size for path in broken.root.glob(".staging/tokens-shard/*/tokens.partial")]
    broken.finish(unbroken)
    assert 12_345 in torn
    assert broken.problems == []
