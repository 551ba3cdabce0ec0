"""Artifacts to the report's tables: lines, splits, packing, shards, conversations, accuracy, stages.

Reads   manifests: identity, stats, produced_by
        quarantine.parquet of documents
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from tasks.report.numbers import count, duration, percent, share, size, whole
from tasks.schemas import SPLITS
from tasks.store import Artifact

Artifacts = Mapping[str, Artifact]

LISTED_SHARDS = 20
LISTED_QUARANTINED = 5
KEY_CHARACTERS = 12  # of a digest: what `seqmill ls` shows, and takes

# The stats that add up to the lines, or conversations, read.
LINES = {
    "num_documents": "documents",
    "num_duplicates": "duplicates of a document before",
    "num_filtered": "outside the length limits",
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


@dataclass(frozen=True)
class Table:
    """Cells of text; the columns after the first ``num_text`` hold numbers and stand right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text: int = 1
    note: str = ""

    def records(self) -> list[dict[str, str]]:
        """One mapping a row, as Prefect takes a table."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def stages_table(artifacts: Artifacts) -> Table:
    """Every artifact with what it was made from, in data order."""
    rows = tuple(
        (
            name,
            ", ".join(_node(artifacts, *given) for given in artifact.manifest.identity["inputs"].items()),
            artifact.key[:KEY_CHARACTERS],
            artifact.content[:KEY_CHARACTERS],
            size(artifact.num_bytes),
            duration(artifact.manifest.produced_by.get("seconds", 0)),
        )
        for name, artifact in artifacts.items()
    )
    return Table(("Stage", "Made from", "Key", "Content", "Size", "Built in"), rows, num_text=4)


def _node(artifacts: Artifacts, given: str, content: str) -> str:
    """The node that an input of this content is: the one called as the input is, else the first; else the input's name."""
    names = [name for name, artifact in artifacts.items() if artifact.content == content]
    return given if given in names or not names else names[0]


def lines_table(documents: Artifact) -> Table:
    """Where every line of the archive went."""
    return ledger_table("Lines", documents.stats, LINES, read="lines read", total=documents.stats["num_lines"])


def conversations_table(examples: Artifact) -> Table:
    """Where every conversation went, and the share of tokens that carry loss."""
    stats = examples.stats
    supervised = share(stats["num_supervised_tokens"], stats["num_tokens"])
    note = (
        f"{whole(stats['num_tokens'])} tokens in {whole(stats['num_rows'])} rows; {supervised} of the tokens carry loss: "
        "the assistant's words and their end."
    )
    total = stats["num_conversations"]
    return ledger_table("Conversations", stats, CONVERSATIONS, read="conversations read", total=total, note=note)


def ledger_table(
    heading: str, stats: Mapping[str, Any], names: Mapping[str, str], *, read: str, total: int, note: str = ""
) -> Table:
    """The counts that add up to ``total``; those of nothing are left out."""
    rows = [(label, whole(stats[name]), share(stats[name], total)) for name, label in names.items() if stats.get(name)]
    rows.append((read, whole(total), share(total, total)))
    return Table((heading, "Count", "Share"), tuple(rows), note=note)


def quarantine_tables(artifact: Artifact) -> tuple[Table, Table] | None:
    """Bad lines by reason, and the first of them; None where there is none."""
    if not artifact.has_file("quarantine.parquet"):
        return None
    rows = pq.read_table(artifact.file("quarantine.parquet")).to_pylist()
    if not rows:
        return None
    reasons = Counter(row["reason"] for row in rows).most_common()
    first = tuple(
        (row["reason"], row["excerpt"].decode(errors="replace"), whole(row["line"])) for row in rows[:LISTED_QUARANTINED]
    )
    return (
        Table(("Reason", "Lines"), tuple((reason, whole(number)) for reason, number in reasons)),
        Table(("Reason", "Begins with", "Line"), first, num_text=2),
    )


def splits_table(artifacts: Artifacts) -> Table:
    """The corpus by split: documents, text, tokens."""
    documents, tokens = artifacts["documents"].stats, artifacts["tokens"].stats if "tokens" in artifacts else {}
    rows = []
    for split in SPLITS:
        text, ids = documents[split], tokens.get(split, {})
        num_tokens = ids.get("num_tokens")
        rows.append(
            (
                split,
                whole(text["num_documents"]),
                size(text["num_bytes"]),
                count(text["num_characters"]),
                count(num_tokens) if num_tokens is not None else "–",
                f"{ids['num_bytes'] / num_tokens:.2f}" if num_tokens else "–",
                whole(text["num_shards"]),
            )
        )
    return Table(("Split", "Documents", "Text", "Characters", "Tokens", "Bytes per token", "Shards"), tuple(rows))


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


def shards_table(artifacts: Artifacts) -> Table:
    """The first shards, with what each became."""
    entries = list(artifacts["documents"].shards())
    tokens = {entry.name: entry.stats for entry in artifacts["tokens"].shards()} if "tokens" in artifacts else {}
    rows = tuple(
        (
            entry.name,
            entry.key[:KEY_CHARACTERS],
            whole(entry.stats["num_documents"]),
            size(entry.stats["num_bytes"]),
            size(entry.num_bytes),
            whole(tokens[entry.name]["num_tokens"]) if "num_tokens" in tokens.get(entry.name, {}) else "–",
        )
        for entry in entries[:LISTED_SHARDS]
    )
    more = len(entries) - len(rows)
    note = f"and {more:,} more" if more else ""
    return Table(("Shard", "Key", "Documents", "Text", "On disk", "Tokens"), rows, num_text=2, note=note)


def accuracy_table(evaluations: Mapping[str, dict[str, Any]]) -> Table:
    """What every model scores, beside the majority baseline. evaluations: model name to evaluation.json."""
    rows = []
    majority = None
    for name, evaluation in evaluations.items():
        validation, held_out = evaluation["validation"], evaluation["held_out"]
        cells = [name, f"{validation['loss']:.3f}", f"{validation['bits_per_byte']:.3f}"] if validation else [name, "–", "–"]
        if held_out:
            majority = held_out
            low, high = held_out["interval"]
            gain = 100 * (held_out["accuracy"] - held_out["majority_share"])
            cells += [percent(held_out["accuracy"]), f"{percent(low)} – {percent(high)}", f"{gain:+.1f} points".replace("-", "−")]
        else:
            cells += ["–", "–", "–"]
        rows.append(tuple(cells))
    note = ""
    if majority:
        rows.append(("majority baseline", "–", "–", percent(majority["majority_share"]), "–", "–"))
        note = f"{majority['num_rows']:,} held-out conversations; the baseline always answers “{majority['majority_response']}”."
    columns = ("Model", "Validation loss", "Bits per byte", "Accuracy", "95% interval", "Over the baseline")
    return Table(columns, tuple(rows), note=note)


def confusion_table(held_out: Mapping[str, Any]) -> Table | None:
    """Answers by expected response; None for open questions."""
    confusion = held_out["confusion"]
    if not confusion:
        return None
    answers = list(next(iter(confusion.values())))
    rows = tuple((response, *(whole(confusion[response][answer]) for answer in answers)) for response in confusion)
    return Table(("Expected", *(f"answered {answer}" for answer in answers)), rows)


def packages_table(artifacts: Iterable[Artifact]) -> Table:
    """The versions of Python and of the packages that built the artifacts; several where they differ."""
    versions: dict[str, dict[str, None]] = {}
    for artifact in artifacts:
        produced_by = artifact.manifest.produced_by
        for package, found in {"python": produced_by.get("python", ""), **produced_by.get("packages", {})}.items():
            versions.setdefault(package, {})[found] = None
    rows = tuple((package, ", ".join(filter(None, found))) for package, found in versions.items())
    return Table(("Package", "Version"), rows, num_text=2)
