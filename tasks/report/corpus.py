"""Corpus artifacts to tables and plots: of all of them for the report, of one alone for the Prefect UI.

Reads   manifests of documents, tokens, blocks, examples: stats, shards
        quarantine.parquet of documents
"""

from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyarrow.parquet as pq

from tasks.report.numbers import count, share, size, whole
from tasks.report.plots import Plot, lengths_plot, shards_plot
from tasks.report.tables import KEY_CHARACTERS, Artifacts, Table
from tasks.schemas import SPLITS
from tasks.store import Artifact, ShardEntry

LISTED_SHARDS = 20
LISTED_QUARANTINED = 20
PLOTTED_SHARDS = 4  # fewer are seen at a glance in their table

# The kinds that list shards, in data order: a shard has one name in all of them.
SHARDED = ("documents", "tokens", "blocks")

# The counts that add up to the lines, or conversations, read.
LINES = {
    "num_documents": "documents",
    "num_duplicates": "duplicates of a document before",
    "num_near_duplicates": "nearly a document before",
    "num_filtered": "filtered",
    "num_blank": "blank",
    "num_quarantined": "quarantined",
}
CONVERSATIONS = {
    "num_examples": "examples",
    "num_duplicates": "duplicates of a conversation before",
    "num_in_held_out": "held out",
    "num_too_long": "too long for a row",
    "num_nothing_to_learn": "nothing to learn in them",
    "num_quarantined": "quarantined",
}

# The counts of a split, or of a shard, that a table shows where there are any.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "num_documents": ("Documents", whole),
    "num_bytes": ("Text", size),
    "num_characters": ("Characters", count),
    "num_tokens": ("Tokens", whole),
    "bytes_per_token": ("Bytes per token", "{:.2f}".format),
    "num_blocks": ("Blocks", whole),
    "num_shards": ("Shards", whole),
    "on_disk": ("On disk", size),
}


def corpus_tables(artifacts: Artifacts) -> Iterator[tuple[str, Table]]:
    """Every table that the artifacts have something for, by name."""
    if documents := artifacts.get("documents"):
        yield "splits", splits_table(artifacts)
        yield "lines", lines_table(documents)
        if found := quarantine_tables(documents):
            yield from zip(("reasons", "quarantined"), found, strict=True)
    if blocks := artifacts.get("blocks"):
        yield "packing", packing_table(blocks)
    if documents:
        yield "shard-sizes", shard_sizes_table(artifacts)
        yield "shards", shards_table(artifacts)


def corpus_plots(artifacts: Artifacts) -> Iterator[Plot]:
    if not (documents := artifacts.get("documents")):
        return
    if histogram := documents.stats.get("length_histogram"):
        yield lengths_plot(histogram)
    sizes = {split: [entry.stats["num_bytes"] for entry in documents.shards(split)] for split in SPLITS}
    if sum(map(len, sizes.values())) >= PLOTTED_SHARDS:
        yield shards_plot(sizes["train"], sizes["validation"])


def corpus_facts(artifacts: Artifacts) -> Iterator[tuple[str, str]]:
    """The corpus in a line: label and value."""
    if documents := artifacts.get("documents"):
        yield "Documents", whole(documents.stats["num_documents"])
        yield "Text", size(sum(documents.stats[split]["num_bytes"] for split in SPLITS))
    if tokens := artifacts.get("tokens"):
        total = _totals(tokens.stats[split] for split in SPLITS)
        yield "Tokens", count(total["num_tokens"])
        if total["num_tokens"]:
            yield "Bytes per token", f"{total['num_bytes'] / total['num_tokens']:.2f}"
        if encoders := tokens.manifest.produced_by.get("encoders"):
            num_shards = sum(encoders.values())
            several = [f"{name} ({shards} of {num_shards} shards)" for name, shards in encoders.items()]
            yield "Encoded by", ", ".join(several if len(several) > 1 else encoders)
    if blocks := artifacts.get("blocks"):
        num_blocks = sum(blocks.stats[split]["num_blocks"] for split in SPLITS)
        yield "Blocks", f"{whole(num_blocks)} × {whole(blocks.stats['block_size'])} ids"


def lines_table(documents: Artifact) -> Table:
    """Where every line of the archive went; what was filtered, by each reason."""
    stats = documents.stats
    counts = [(label, stats.get(name, 0)) for name, label in LINES.items()]
    if reasons := stats.get("filtered_by"):
        place = counts.index((LINES["num_filtered"], stats["num_filtered"]))
        counts[place : place + 1] = [(f"filtered: {reason}", number) for reason, number in reasons.items()]
    return ledger_table("Lines", counts, read="lines read", total=stats["num_lines"])


def conversations_table(examples: Artifact) -> Table:
    """Where every conversation went, and the share of tokens that carry loss."""
    stats = examples.stats
    supervised = share(stats["num_supervised_tokens"], stats["num_tokens"])
    note = (
        f"{whole(stats['num_tokens'])} tokens in {whole(stats['num_rows'])} rows; {supervised} of the tokens carry loss: "
        "the assistant's words and their end."
    )
    counts = [(label, stats.get(name, 0)) for name, label in CONVERSATIONS.items()]
    return ledger_table("Conversations", counts, read="conversations read", total=stats["num_conversations"], note=note)


def mask_table(examples: Artifact) -> Table:
    """How many tokens carry loss, by split, and how many answers were read back out of the rows."""
    rows = []
    for split in SPLITS:
        if (stats := examples.stats.get(split)) and stats["num_examples"]:
            supervised = share(stats["num_supervised_tokens"], stats["num_tokens"])
            counts = ("num_examples", "num_rows", "num_tokens", "num_supervised_tokens")
            rows.append((split, *(whole(stats[name]) for name in counts), supervised, whole(stats["num_answers_proven"])))
    columns = ("Split", "Examples", "Rows", "Tokens", "Carry loss", "Share", "Answers proven")
    return Table(columns, tuple(rows))


def ledger_table(heading: str, counts: Iterable[tuple[str, int]], *, read: str, total: int, note: str = "") -> Table:
    """The counts that add up to ``total``; those of nothing are left out."""
    rows = [(label, whole(number), share(number, total)) for label, number in counts if number]
    rows.append((read, whole(total), share(total, total)))
    return Table((heading, "Count", "Share"), tuple(rows), note=note)


def quarantine_tables(artifact: Artifact) -> tuple[Table, Table] | None:
    """Bad lines by reason, and the first of them; None where there is none."""
    if not artifact.has_file("quarantine.parquet"):
        return None
    with pq.ParquetFile(artifact.file("quarantine.parquet")) as file:
        if not file.metadata.num_rows:
            return None
        reasons = Counter(file.read(columns=["reason"])["reason"].to_pylist()).most_common()  # not the excerpts of all
        first = next(file.iter_batches(LISTED_QUARANTINED)).to_pylist()
    more = sum(number for _, number in reasons) - len(first)
    rows = tuple((whole(row["line"]), row["reason"], row["excerpt"].decode(errors="replace")) for row in first)
    return (
        Table(("Reason", "Lines"), tuple((reason, whole(number)) for reason, number in reasons)),
        Table(("Line", "Reason", "Begins with"), rows, num_text=3, note=_more(more)),
    )


def splits_table(artifacts: Artifacts) -> Table:
    """The corpus by split, and of both: documents, text, tokens. artifacts: documents, tokens, or both."""
    known = [artifacts[kind].stats for kind in ("documents", "tokens") if kind in artifacts]
    splits = {split: {name: value for stats in known for name, value in stats[split].items()} for split in SPLITS}
    splits["both"] = _totals(splits.values())
    for stats in splits.values():
        if stats.get("num_tokens"):
            stats["bytes_per_token"] = stats["num_bytes"] / stats["num_tokens"]
    return counts_table(("Split",), [((split,), stats) for split, stats in splits.items()])


def packing_table(blocks: Artifact) -> Table:
    """Every token in, and where it went."""
    block_size = blocks.stats["block_size"]
    rows = []
    for split in SPLITS:
        stats = blocks.stats[split]
        packed = stats["num_blocks"] * block_size
        rows.append((split, whole(stats["num_tokens"]), whole(stats["num_blocks"]), whole(packed), whole(stats["num_remainder"])))
    note = f"Tokens in = blocks × {block_size:,} + left over: less than one block a split."
    return Table(("Split", "Tokens in", "Blocks", "Tokens in blocks", "Left over"), tuple(rows), note=note)


def shard_sizes_table(artifacts: Artifacts) -> Table:
    """The shards of every stage that has some, together: bytes on disk, tokens, the smallest and the largest."""
    rows = []
    for kind in SHARDED:
        if kind in artifacts and (entries := list(artifacts[kind].shards())):
            sizes = [entry.num_bytes for entry in entries]
            tokens = _totals(entry.stats for entry in entries).get("num_tokens")
            told = (whole(len(entries)), size(sum(sizes)), "–" if tokens is None else whole(tokens))
            rows.append((kind, *told, size(min(sizes)), size(max(sizes))))
    return Table(("Stage", "Shards", "On disk", "Tokens", "Smallest", "Largest"), tuple(rows))


def shards_table(artifacts: Artifacts) -> Table:
    """The first shards, each with what it became in every stage that is given; its key is the first one's."""
    stages = [list(artifacts[kind].shards()) for kind in SHARDED if kind in artifacts]
    stages = [entries for entries in stages if entries]
    rows = [_shard_row(entries) for entries in zip(*(entries[:LISTED_SHARDS] for entries in stages), strict=True)]
    return counts_table(("Shard", "Key"), rows, note=_more(len(stages[0]) - len(rows)) if stages else "")


def _shard_row(entries: tuple[ShardEntry, ...]) -> tuple[tuple[str, str], Mapping[str, Any]]:
    counts = {name: value for entry in entries for name, value in entry.stats.items()}
    on_disk = sum(entry.num_bytes for entry in entries)
    return (entries[0].name, entries[0].key[:KEY_CHARACTERS]), {**counts, "on_disk": on_disk}


def counts_table(heading: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], Mapping[str, Any]]], note: str = "") -> Table:
    """Rows of counts: a column for each of COLUMNS that any row has."""
    rows = list(rows)
    shown = [(name, *told) for name, told in COLUMNS.items() if any(name in counts for _, counts in rows)]
    cells = tuple(
        (*names, *(spell(counts[name]) if name in counts else "–" for name, _, spell in shown)) for names, counts in rows
    )
    return Table((*heading, *(label for _, label, _ in shown)), cells, num_text=len(heading), note=note)


def _totals(several: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """The sums, name by name."""
    totals: Counter[str] = Counter()
    for counts in several:
        totals.update(counts)
    return totals


def _more(number: int) -> str:
    return f"and {number:,} more" if number else ""


def shown_tables(artifact: Artifact) -> dict[str, list[dict[str, str]]]:
    """The tables of one corpus artifact alone, by Prefect's artifact key (lower case, digits, dashes)."""
    return {name: table.records() for name, table in _own_tables(artifact) if table and table.rows}


def _own_tables(artifact: Artifact) -> Iterator[tuple[str, Table | None]]:
    alone = {artifact.kind: artifact}
    if artifact.kind == "documents":
        _, quarantined = quarantine_tables(artifact) or (None, None)
        yield "documents-ledger", lines_table(artifact)
        yield "documents-splits", splits_table(alone)
        yield "documents-quarantined", quarantined
    elif artifact.kind == "tokens":
        yield "tokens-splits", splits_table(alone)
    elif artifact.kind == "blocks":
        yield "blocks-ledger", packing_table(artifact)
    elif artifact.kind == "examples":
        _, quarantined = quarantine_tables(artifact) or (None, None)
        yield "examples-ledger", conversations_table(artifact)
        yield "examples-mask", mask_table(artifact)
        yield "examples-quarantined", quarantined
    if artifact.kind in SHARDED:
        yield f"{artifact.kind}-shard-sizes", shard_sizes_table(alone)
        yield f"{artifact.kind}-shards", shards_table(alone)


def shown_markdown(artifact: Artifact) -> str:
    """One corpus artifact alone in short, its plots inside."""
    alone = {artifact.kind: artifact}
    facts = "\n".join(f"- **{label}**: {value}" for label, value in corpus_facts(alone))
    plots = [f"## {plot.title}\n\n{inline_image(plot.title, plot.png)}" for plot in corpus_plots(alone)]
    return "\n\n".join([f"# {artifact.kind}", *filter(None, [facts]), *plots])


def inline_image(title: str, png: bytes) -> str:
    """A picture in Markdown that asks no server."""
    return f"![{title}](data:image/png;base64,{b64encode(png).decode()})"
