"""The ledger on manifests written by hand: what adds up has no problem, and each count that is changed has one."""

import copy
from pathlib import Path
from typing import Any

import pytest

from tasks.corpus.ledger import problems
from tasks.store import Artifact, Digest, FileEntry, Manifest, ShardEntry

NOWHERE = Digest("0" * 64)


def artifact(kind: str, stats: dict[str, Any], shards: dict[str, Any] | None = None, **spec: Any) -> Artifact:
    """An artifact that is nowhere on disk."""
    entries = tuple(
        ShardEntry(name=name, kind=f"{kind}-shard", key=NOWHERE, content=NOWHERE, num_bytes=0, stats=counts)
        for name, counts in (shards or {}).items()
    )
    identity = {"kind": kind, "spec": spec, "inputs": {}}
    files = (FileEntry(name="archive", num_bytes=9, digest=Digest("a" * 64)),)
    told = {"kind": kind, "key": NOWHERE, "content": NOWHERE, "created": "", "identity": identity}
    return Artifact(Path("/nowhere"), Manifest(files=files, shards=entries, stats=stats, **told), found=True)


TEXT_SHARDS = {
    "train/00000": {"num_documents": 4, "num_bytes": 40, "num_characters": 20},
    "train/00001": {"num_documents": 2, "num_bytes": 25, "num_characters": 9},
    "validation/00000": {"num_documents": 1, "num_bytes": 5, "num_characters": 5},
}
TEXT = {
    "num_lines": 16,
    "num_documents": 7,
    "num_quarantined": 1,
    "num_filtered": 3,
    "num_duplicates": 2,
    "num_near_duplicates": 1,
    "num_blank": 2,
    "filtered_by": {"too short": 2, "too few letters": 1},
    "length_histogram": {"1": 3, "4": 4},
    "train": {"num_documents": 6, "num_bytes": 65, "num_characters": 29, "num_shards": 2},
    "validation": {"num_documents": 1, "num_bytes": 5, "num_characters": 5, "num_shards": 1},
}
TOKEN_SHARDS = {
    "train/00000": {"num_documents": 4, "num_bytes": 40, "num_tokens": 30},
    "train/00001": {"num_documents": 2, "num_bytes": 25, "num_tokens": 15},
    "validation/00000": {"num_documents": 1, "num_bytes": 5, "num_tokens": 6},
}
TOKENS = {
    "train": {"num_documents": 6, "num_bytes": 65, "num_tokens": 45, "num_shards": 2},
    "validation": {"num_documents": 1, "num_bytes": 5, "num_tokens": 6, "num_shards": 1},
}
BLOCK_SHARDS = {  # of 8 ids: 30 = 3 * 8 + 6, 15 = 8 + 7, 6 = 6; the tails 6 + 7 = 8 + 5
    "train/00000": {"num_documents": 4, "num_bytes": 40, "num_tokens": 30, "num_blocks": 3, "num_tail": 6},
    "train/00001": {"num_documents": 2, "num_bytes": 25, "num_tokens": 15, "num_blocks": 1, "num_tail": 7},
    "validation/00000": {"num_documents": 1, "num_bytes": 5, "num_tokens": 6, "num_blocks": 0, "num_tail": 6},
}
BLOCKS = {
    "block_size": 8,
    "train": {"num_documents": 6, "num_bytes": 65, "num_tokens": 45, "num_blocks": 5, "num_remainder": 5},
    "validation": {"num_documents": 1, "num_bytes": 5, "num_tokens": 6, "num_blocks": 0, "num_remainder": 6},
}
SPLIT = {"num_examples": 4, "num_rows": 2, "num_tokens": 50, "num_supervised_tokens": 20}
NONE = dict.fromkeys(SPLIT, 0)
EXAMPLES = {
    "block_size": 32,
    "num_conversations": 9,
    **{"num_quarantined": 1, "num_duplicates": 1, "num_in_held_out": 1, "num_too_long": 1, "num_nothing_to_learn": 1},
    **SPLIT,
    "train": SPLIT,
    "validation": NONE,
    "held_out": {"num_conversations": 6, "num_held_out": 4, "num_quarantined": 1, "num_too_long": 1},
}

WHOLE: dict[str, tuple[Artifact, dict[str, Artifact]]] = {
    "archive": (artifact("archive", {"num_bytes": 9, "sha256": "a" * 64}), {}),
    "documents": (artifact("documents", TEXT, TEXT_SHARDS), {}),
    "tokens": (artifact("tokens", TOKENS, TOKEN_SHARDS), {"documents": artifact("documents", TEXT, TEXT_SHARDS)}),
    "tokens-shard": (
        artifact("tokens-shard", TOKEN_SHARDS["train/00000"]),
        {"documents": artifact("documents-shard", TEXT_SHARDS["train/00000"])},
    ),
    "blocks": (artifact("blocks", BLOCKS, BLOCK_SHARDS), {"tokens": artifact("tokens", TOKENS, TOKEN_SHARDS)}),
    "blocks-shard": (
        artifact("blocks-shard", BLOCK_SHARDS["train/00000"], block_size=8),
        {"tokens": artifact("tokens-shard", TOKEN_SHARDS["train/00000"])},
    ),
    "examples": (artifact("examples", EXAMPLES, block_size=32), {}),
}
FREE = {("tokens-shard", "num_tokens")}  # what only the file can tell


def counts(stats: dict[str, Any], *above: str) -> list[tuple[str, ...]]:
    """The path of every number."""
    found: list[tuple[str, ...]] = []
    for name, value in stats.items():
        found += counts(value, *above, name) if isinstance(value, dict) else [(*above, name)]
    return found


def changed(whole: Artifact, path: tuple[str, ...]) -> Artifact:
    stats = copy.deepcopy(whole.stats)
    target = stats
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = target[path[-1]] + 1 if isinstance(target[path[-1]], int) else "another"
    return Artifact(whole.root, whole.manifest.model_copy(update={"stats": stats}), found=True)


@pytest.mark.parametrize("kind", WHOLE)
def test_what_adds_up_has_no_problem(kind: str) -> None:
    assert problems(*WHOLE[kind]) == []


@pytest.mark.parametrize(
    ("kind", "path"),
    [(kind, path) for kind, (whole, _) in WHOLE.items() for path in counts(whole.stats) if (kind, *path) not in FREE],
)
def test_every_count_that_is_one_too_many_is_found(kind: str, path: tuple[str, ...]) -> None:
    whole, inputs = WHOLE[kind]
    assert problems(changed(whole, path), inputs) != []


@pytest.mark.parametrize("path", [("train", "num_documents"), ("validation", "num_bytes")])
def test_a_count_that_differs_from_the_inputs_is_found(path: tuple[str, ...]) -> None:
    tokens, inputs = WHOLE["tokens"]
    assert problems(tokens, {"documents": changed(inputs["documents"], path)}) != []


def test_a_problem_says_both_numbers() -> None:
    documents, _ = WHOLE["documents"]
    (said,) = problems(changed(documents, ("num_blank",)), {})
    assert said == (
        "num_lines is 16, num_documents + num_quarantined + num_filtered + num_duplicates + num_near_duplicates + num_blank is 17"
    )


def test_a_remainder_of_a_whole_block_is_found_though_the_sum_is_right() -> None:
    stats = {**BLOCKS, "train": {**BLOCKS["train"], "num_blocks": 4, "num_remainder": 13}}  # type: ignore[dict-item]
    assert "train num_remainder is 13, a whole block of 8 or more" in problems(artifact("blocks", stats, BLOCK_SHARDS), {})


def test_counts_of_options_that_are_absent_are_0() -> None:
    without = {name: value for name, value in TEXT.items() if name not in {"num_near_duplicates", "filtered_by"}}
    assert problems(artifact("documents", {**without, "num_lines": 15}, TEXT_SHARDS), {}) == []


def test_inputs_that_are_gone_are_no_problem() -> None:
    assert problems(WHOLE["tokens"][0], {}) == []


def test_a_count_that_lacks_is_a_problem_not_a_traceback() -> None:
    assert problems(artifact("tokens", {}), {}) == ["its manifest lacks a count (KeyError: 'train')"]


def test_a_kind_without_a_ledger_has_no_problem() -> None:
    assert problems(artifact("report", {}), {}) == []
