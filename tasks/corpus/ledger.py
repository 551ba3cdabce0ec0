"""The ledger: what the counts of a finished artifact must add up to, in itself, with its shards and with its inputs.

Reads   manifests: stats, files, shards
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tasks.schemas import SPLITS
from tasks.store import Artifact, ShardEntry

Inputs = Mapping[str, Artifact]  # by input name; those that the store still holds

# Where a line of the archive, or a conversation, may go. A count that a manifest does not have is 0.
LINE_WAYS = ("num_documents", "num_quarantined", "num_filtered", "num_duplicates", "num_near_duplicates", "num_blank")
CONVERSATION_WAYS = (
    "num_examples", "num_quarantined", "num_duplicates", "num_in_held_out", "num_too_long", "num_nothing_to_learn",
)  # fmt: skip
HELD_OUT_WAYS = ("num_held_out", "num_quarantined", "num_too_long")


def problems(artifact: Artifact, inputs: Inputs) -> list[str]:
    """Every equation that does not hold, in words; none for a kind that keeps no ledger."""
    ledger = LEDGERS.get(artifact.kind)
    try:
        return list(ledger(artifact, inputs)) if ledger else []
    except (KeyError, TypeError, AttributeError) as error:
        return [f"its manifest lacks a count ({type(error).__name__}: {error})"]


def of_archive(archive: Artifact, inputs: Inputs) -> Iterator[str]:
    (published,) = archive.manifest.files
    yield from _equal("num_bytes", archive.stats["num_bytes"], "its file's size", published.num_bytes)
    yield from _equal("sha256", archive.stats["sha256"], "its file's digest", published.digest)


def of_documents(documents: Artifact, inputs: Inputs) -> Iterator[str]:
    stats = documents.stats
    yield from _sum(stats, "num_lines", LINE_WAYS)
    yield from _equal("num_documents", stats["num_documents"], "that of both splits", _both(stats, "num_documents"))
    lengths = sum(stats["length_histogram"].values())
    yield from _equal("num_documents", stats["num_documents"], "that of length_histogram", lengths)
    if "filtered_by" in stats:
        yield from _equal("num_filtered", stats["num_filtered"], "that of filtered_by", sum(stats["filtered_by"].values()))
    yield from _shard_sums(documents, ("num_documents", "num_bytes", "num_characters"))
    yield from _shard_counts(documents)


def of_tokens(tokens: Artifact, inputs: Inputs) -> Iterator[str]:
    yield from _shard_sums(tokens, ("num_documents", "num_tokens", "num_bytes"))
    yield from _shard_counts(tokens)
    yield from _as_its_input(tokens, inputs, "documents", ("num_documents", "num_bytes"))


def of_blocks(blocks: Artifact, inputs: Inputs) -> Iterator[str]:
    block_size = blocks.stats["block_size"]
    for split in SPLITS:
        stats, shards = blocks.stats[split], [entry.stats for entry in blocks.shards(split)]
        placed = stats["num_blocks"] * block_size + stats["num_remainder"]
        yield from _equal(f"{split} num_tokens", stats["num_tokens"], "num_blocks * block_size + num_remainder", placed)
        if stats["num_remainder"] >= block_size:
            yield f"{split} num_remainder is {stats['num_remainder']}, a whole block of {block_size} or more"
        rows = stats["num_blocks"] - sum(shard["num_blocks"] for shard in shards)
        packed, tails = rows * block_size + stats["num_remainder"], sum(shard["num_tail"] for shard in shards)
        yield from _equal(f"{split} num_tail of its shards", tails, "what they were packed to", packed)
    yield from _shard_sums(blocks, ("num_tokens", "num_documents", "num_bytes"))
    yield from _as_its_input(blocks, inputs, "tokens", ("num_tokens", "num_documents", "num_bytes"))


def of_tokens_shard(shard: Artifact, inputs: Inputs) -> Iterator[str]:
    yield from _as_its_shard(shard, inputs, "documents", ("num_documents", "num_bytes"))


def of_blocks_shard(shard: Artifact, inputs: Inputs) -> Iterator[str]:
    stats, block_size = shard.stats, shard.spec["block_size"]
    placed = stats["num_blocks"] * block_size + stats["num_tail"]
    yield from _equal("num_tokens", stats["num_tokens"], "num_blocks * block_size + num_tail", placed)
    yield from _as_its_shard(shard, inputs, "tokens", ("num_tokens", "num_documents", "num_bytes"))


def of_examples(examples: Artifact, inputs: Inputs) -> Iterator[str]:
    stats = examples.stats
    yield from _sum(stats, "num_conversations", CONVERSATION_WAYS)
    for name in ("num_examples", "num_rows", "num_tokens", "num_supervised_tokens"):
        yield from _equal(name, stats[name], "that of both splits", _both(stats, name))
    yield from _equal("block_size", stats["block_size"], "that of its spec", examples.spec["block_size"])
    if stats["num_tokens"] > stats["num_rows"] * stats["block_size"]:
        yield f"num_tokens is {stats['num_tokens']}, more than {stats['num_rows']} rows of {stats['block_size']} hold"
    if "held_out" in stats:
        yield from _sum(stats["held_out"], "num_conversations", HELD_OUT_WAYS, "held_out ")


# A documents shard has no equation of its own: its counts are sums over its file (tasks.corpus.recount).
LEDGERS: dict[str, Callable[[Artifact, Inputs], Iterator[str]]] = {
    "archive": of_archive,
    "documents": of_documents,
    "tokens": of_tokens,
    "tokens-shard": of_tokens_shard,
    "blocks": of_blocks,
    "blocks-shard": of_blocks_shard,
    "examples": of_examples,
}


def _equal(name: str, found: object, other: str, expected: object) -> Iterator[str]:
    if found != expected:
        yield f"{name} is {found}, {other} is {expected}"


def _sum(stats: Mapping[str, Any], total: str, ways: tuple[str, ...], where: str = "") -> Iterator[str]:
    yield from _equal(where + total, stats[total], " + ".join(ways), sum(stats.get(way, 0) for way in ways))


def _both(stats: Mapping[str, Any], name: str) -> int:
    return sum(stats[split][name] for split in SPLITS)


def _shard_sums(artifact: Artifact, names: tuple[str, ...]) -> Iterator[str]:
    for split in SPLITS:
        for name in names:
            of_shards = sum(entry.stats[name] for entry in artifact.shards(split))
            yield from _equal(f"{split} {name}", artifact.stats[split][name], "that of its shards", of_shards)


def _shard_counts(artifact: Artifact) -> Iterator[str]:
    for split in SPLITS:
        num_listed = len(list(artifact.shards(split)))
        yield from _equal(f"{split} num_shards", artifact.stats[split]["num_shards"], "the number it lists", num_listed)


def _as_its_input(artifact: Artifact, inputs: Inputs, name: str, counts: tuple[str, ...]) -> Iterator[str]:
    """What went in is what came out, split by split, and shard by shard in one order."""
    if name not in inputs:
        return
    for split in SPLITS:
        for count in counts:
            yield from _equal(
                f"{split} {count}", artifact.stats[split][count], f"that of its {name}", inputs[name].stats[split][count]
            )
    ours, theirs = _names(artifact.manifest.shards), _names(inputs[name].manifest.shards)
    yield from _equal("its list of shards", ours, f"that of its {name}", theirs)


def _as_its_shard(shard: Artifact, inputs: Inputs, name: str, counts: tuple[str, ...]) -> Iterator[str]:
    if name in inputs:
        for count in counts:
            yield from _equal(count, shard.stats[count], f"that of its {name}", inputs[name].stats[count])


def _names(entries: tuple[ShardEntry, ...]) -> str:
    return f"{len(entries)} shards {entries[0].name} to {entries[-1].name}" if entries else "empty"
